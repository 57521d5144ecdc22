"""Perplexity and measured sparsity."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from . import ranks
from .activations import Store
from .blockwise import last_hidden_states
from .errors import RunError
from .model import LanguageModel
from .progress import progress

LOGITS_AT_ONCE = 2**23  # elements: 32 MiB of float32


@torch.no_grad()
def perplexity(
    model: LanguageModel,
    windows: Tensor,
    *,
    batch_size: int = 1,
    what: str = "perplexity",
    store: Store | None = None,
) -> float:
    """exp of the mean negative log-likelihood of tokens 2..seqlen of each window (the protocol of GPTQ).

    windows (windows, seqlen) token ids, of which each rank takes its share. Logits exist for a chunk of positions at a
    time, never for a window. Raises RunError where the result is not finite.
    """
    total, shard = torch.zeros(1, dtype=torch.float64), ranks.shard(windows)
    with progress(None, what, "window", total=len(shard)) as bar:
        for tokens, hidden in last_hidden_states(model, shard, batch_size, store):
            total += _losses(model, tokens, hidden).sum()
            bar.update(len(tokens))
    ranks.all_reduce(total)
    mean = float(total) / (windows.shape[0] * (windows.shape[1] - 1))
    if not mean < 700:  # beyond what exp can take, or NaN
        raise RunError(f"{what}: the model's mean loss is {mean:g} nats a token; try --dtype float32 or bfloat16")
    return math.exp(mean)


@torch.no_grad()
def bos_effect(model: LanguageModel, window: Tensor, bos: int, store: Store | None = None) -> dict[str, float]:
    """The model's mean loss, in nats a token, on one window's tokens with BOS in front of them and without.

    window (seqlen,) token ids, of which a BOS that is there already is left out. Both losses are of the same tokens:
    all but the first, of which nothing is known without BOS, and the last. Free where a window has none of them.
    """
    text = window[1:] if window[0] == bos else window
    pair = torch.stack([torch.cat([text.new_tensor([bos]), text[:-1]]), text])
    (begun, bare) = [_losses(model, *batch)[0] for batch in last_hidden_states(model, pair, 1, store)]
    return {"loss_with_bos": float(begun[1:].mean()), "loss_without_bos": float(bare[:-1].mean())}


def _losses(model: LanguageModel, tokens: Tensor, hidden: Tensor) -> Tensor:
    """The negative log-likelihood of each predicted token of a batch (B, S) with last hidden states (B, S, d), in nats;
    (B, S - 1), float64, on the CPU.
    """
    losses, begin = [], 1
    for logits in logits_in_parts(model, hidden[:, :-1]):  # (B, S-1, d) predict tokens[:, 1:]
        targets = tokens[:, begin : begin + logits.shape[1]].to(logits.device)
        of_part = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
        losses.append(of_part.view_as(targets).cpu().double())
        begin += logits.shape[1]
    return torch.cat(losses, dim=1)


def logits_in_parts(model: LanguageModel, hidden: Tensor) -> Iterator[Tensor]:
    """The logits (B, part, vocabulary) of last hidden states (B, S, d), of a chunk of positions at a time.

    A chunk is laid out anew: of a slice, even of a single window, torch makes a product for each window.
    """
    vocabulary = model.model.get_output_embeddings().weight.shape[0]
    for part in hidden.split(max(1, LOGITS_AT_ONCE // (vocabulary * len(hidden))), dim=1):
        yield model.logits(part.flatten(0, 1).unflatten(0, part.shape[:2]))


def sparsity_by_matrix(model: LanguageModel) -> dict[str, float]:
    """The share of zeros in each prunable matrix, counted; of a streamed model in the files that it was written to."""
    found = {}
    for group in model.groups():
        with model.resident(group):
            found |= {m.name: 1 - int(m.weight.count_nonzero()) / m.size for m in group}
    return found
