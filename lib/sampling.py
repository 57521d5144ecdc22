"""The dense model's own text: windows that it samples itself, where no data set is at hand or is of its domain."""

import hashlib
import logging
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor

from . import ranks, tokens
from .attention import without_cudnn_attention
from .errors import RunError, reason_of
from .model import LanguageModel
from .progress import progress

log = logging.getLogger(__name__)

WITHOUT = "it has no text of its own for --calib_data, --calib_self or --recover_self"
AT_ONCE = 16_384  # tokens of the windows that are sampled together


def sample_windows(
    model: LanguageModel, count: int, *, seqlen: int, seed: int = 0, add_bos: str = "once", known: Tensor | None = None
) -> Tensor:
    """At least `count` windows of `seqlen` tokens, each sampled from the model at temperature 1; (n, seqlen), int64.

    A window begins as the tokenizer begins a text, with BOS where `add_bos` is "every"; where that is nothing, with a
    token drawn from the vocabulary. What follows the end of a text is the model's own as well. The windows are the
    first of a series that depends on the model, the seed and the other settings alone: `known` are those that are
    there already. Ranks share the work. Raises RunError for a model that cannot generate.
    """
    each, known = max(1, AT_ONCE // seqlen), torch.empty(0, seqlen, dtype=torch.int64) if known is None else known
    known = known[: len(known) // each * each]
    batches = range(len(known) // each, -(-count // each))
    prefix = _prefix(model, add_bos)[: seqlen - 1]
    with _plain_generation(model):
        share = [
            (batch, _sampled(model, prefix, each, seqlen, f"{seed} {batch}"))
            for batch in progress(batches[ranks.rank() :: ranks.world_size()], "the model's own text", "batch")
        ]
    written = dict(pair for pairs in ranks.all_gather(share) for pair in pairs)
    return torch.cat([known, *(written[batch] for batch in batches)])


def _prefix(model: LanguageModel, add_bos: str) -> list[int]:
    if model.tokenizer is None:
        return []
    if add_bos != "every":
        return tokens.prefix(model.tokenizer)
    bos = tokens.bos(model.tokenizer)
    if bos is None:
        raise RunError("--add_bos every: the model's tokenizer has no BOS; leave it at once")
    return [bos]


def _sampled(model: LanguageModel, prefix: list[int], count: int, seqlen: int, seed: str) -> Tensor:
    """(count, seqlen), on the host."""
    number = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8], "big", signed=True)
    with torch.random.fork_rng([device for device in model.devices if device.type == "cuda"]):
        torch.manual_seed(number)
        begun = torch.tensor(prefix).expand(count, -1) if prefix else torch.randint(_vocabulary(model), (count, 1))
        begun = begun.to(model.device)
        try:
            with torch.no_grad():
                found = model.model.generate(
                    begun, attention_mask=torch.ones_like(begun), max_new_tokens=seqlen - begun.shape[1],
                    logits_processor=[_Draw()],
                )  # fmt: skip
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a model's own code may raise
            raise RunError(
                f"{type(model.model).__name__} cannot sample a text ({reason_of(error)}); {WITHOUT}"
            ) from error
    if found.shape != (count, seqlen):
        raise RunError(
            f"{type(model.model).__name__} gives {found.shape[1]} tokens where {seqlen} were asked for; {WITHOUT}"
        )
    return found.cpu()


class _Draw(LogitsProcessor):
    """Leaves of the logits (windows, vocabulary) the one token of each window that is drawn from their distribution.

    By inversion of the cumulative sums: one random number a window, where `torch.multinomial`, and with it generate's
    own sampling, takes one for each token of the vocabulary. Raises ValueError for logits without a distribution.
    """

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        sums = scores.softmax(-1, dtype=torch.float32).cumsum(-1, dtype=torch.float64)
        if not sums[:, -1].isfinite().all():
            raise ValueError("its logits hold NaN or infinity")
        below = torch.rand(len(sums), 1, dtype=torch.float64, device=sums.device) * sums[:, -1:]
        drawn = torch.searchsorted(sums, below, right=True).clamp(max=sums.shape[-1] - 1)
        return torch.full_like(scores, -torch.inf).scatter_(-1, drawn, 0.0)


def _vocabulary(model: LanguageModel) -> int:
    """Tokens that there are; a model may have rows for more."""
    rows = model.model.get_input_embeddings().weight.shape[0]
    return rows if model.tokenizer is None else min(rows, len(model.tokenizer))


@contextmanager
def _plain_generation(model: LanguageModel):
    """While the model's own generation configuration is out of the way: no token is favoured, and none ends a text."""
    own = getattr(model.model, "generation_config", None)
    model.model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)  # takes what _Draw leaves
    try:
        with without_cudnn_attention():
            yield
    finally:
        model.model.generation_config = own
