"""The model at hand as lm_eval, the evaluation harness, sees it; imported where a task is evaluated, and only there."""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace

import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import Collator
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from . import ranks
from .activations import Store
from .errors import RunError
from .model import LanguageModel
from .progress import progress
from .stream import last_hidden_states

Request = tuple[tuple[str, str] | None, list[int], list[int]]  # texts, and tokens of the context and of what follows it
Answer = tuple[float, bool]  # the log-likelihood in nats, and whether greedy decoding gives it
AT_LEAST = 2**28  # bytes of hidden states that a pass over a streamed model carries, however little memory there is


class HarnessModel(HFLM):
    """lm_eval's own model class around a LanguageModel: its tokens, batches and scores, on our forward passes.

    batch(length) is how many requests of so many tokens are one batch; the longest come first. `bos` goes in front of
    every text, in place of what the tokenizer puts there. A streamed model is passed over once for all requests, or as
    often as their hidden states need to fit into `store`. The requests are shared by the ranks, and every rank has all
    answers. `cut` counts requests that were longer than the model's window and lost their beginning, as the harness
    does it.
    """

    def __init__(
        self, model: LanguageModel, batch: Callable[[int], int], *, bos: int | None = None, store: Store | None = None,
        what: str = "zero-shot",
    ):  # fmt: skip
        self._language_model, self._batch, self._bos = model, batch, bos
        self._store, self._what, self.cut = store, what, 0
        # Without the model itself, whose ties and tokenizer HFLM would set anew.
        inner = SimpleNamespace(
            device=model.device, config=model.model.config, generate=getattr(model.model, "generate", None)
        )
        super().__init__(inner, backend="causal", tokenizer=copy.deepcopy(model.tokenizer), batch_size="auto")

    def _create_tokenizer(self, _pretrained, tokenizer, **_options) -> None:
        self.tokenizer = tokenizer  # of any class

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **options) -> list[int]:
        """The text's tokens."""
        if add_special_tokens is None and self._bos is None and self.prefix_token_id is None:
            return self.tokenizer.encode(string)  # HFLM asks whether the text begins with a token that is not there
        if self._bos is None or add_special_tokens is not None:
            return super().tok_encode(string, add_special_tokens, **options)
        found = super().tok_encode(string, add_special_tokens=False, **options)
        return found if found[:1] == [self._bos] else [self._bos, *found]

    def loglikelihood(self, requests: list, disable_tqdm: bool = True) -> list[Answer]:
        """Of each request's continuation after its context."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = True) -> list[float]:
        """Of each request's whole text, in windows that have no token in common."""
        windows, owners = [], []
        for number, request in enumerate(requests):
            cut = get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, max_seq_len=self.max_length, context_len=1
            )
            windows += [(None, *make_disjoint_window(window)) for window in cut]
            owners += [number] * (len(windows) - len(owners))
        sums = [0.0] * len(requests)
        for owner, (value, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            sums[owner] += value
        return sums

    def generate_until(self, requests: list, disable_tqdm: bool = True) -> list[str]:
        """The model's own continuation of each request."""
        if self._language_model.streamed:
            raise RunError("--stream: a streamed model gives log-likelihoods and generates no text")
        self.batch_size_per_gpu = self._batch(self.max_length)
        try:
            mine = requests[ranks.rank() :: ranks.size()]
            parts = ranks.gather(super().generate_until(mine, disable_tqdm=True) if mine else [])
        finally:
            self.batch_size_per_gpu = "auto"
        answers: list = [None] * len(requests)
        for rank, part in enumerate(parts):
            answers[rank :: ranks.size()] = part
        return answers

    def _loglikelihood_tokens(self, requests: list[Request], **_options) -> list[Answer]:
        """Every rank's answers to its share, on every rank."""
        self._check(requests)
        groups: dict[tuple, list[int]] = {}  # those that one row of logits answers
        for number, request in enumerate(requests):
            groups.setdefault(tuple(_read(request)), []).append(number)
        owners = ranks.deal([len(read) for read in groups])
        shares: list[list[int]] = [[] for _ in range(ranks.size())]
        for numbers, owner in zip(groups.values(), owners, strict=True):
            shares[owner] += numbers
        parts = ranks.gather(self._answers([requests[number] for number in sorted(shares[ranks.rank()])]))
        answers: list = [None] * len(requests)
        for share, part in zip(shares, parts, strict=True):
            for number, answer in zip(sorted(share), part, strict=True):
                answers[number] = answer
        if not all(math.isfinite(value) for value, _ in answers):
            raise RunError(f"{self._what}: log-likelihoods are NaN or infinite; try --dtype float32 or bfloat16")
        return answers

    def _check(self, requests: list[Request]) -> None:
        for texts, context, continuation in requests:
            if context == [None]:
                raise RunError(
                    f"{self._what}: a text has nothing before it, and the model's tokenizer no BOS and no EOS"
                )
            if not (context and continuation):
                raise RunError(f"{self._what}: the model's tokenizer gives no token for a part of {texts!r}")
            if len(continuation) > self.max_length:
                raise RunError(
                    f"{self._what}: a continuation of {len(continuation)} tokens is longer than the model's window "
                    f"of {self.max_length}"
                )
        self.cut += sum(len(_read(request)) > self.max_length for request in requests)

    def _answers(self, requests: list[Request]) -> list[Answer]:
        """HFLM's scores, of logits that wait for it, batch by batch, when it asks."""
        batches = self._batches(requests)
        self._waiting = self._logits(batches)
        answers = super()._loglikelihood_tokens(requests, disable_tqdm=True) if requests else []
        for _ in self._waiting:
            raise AssertionError("lm_eval left a batch unread")
        return answers

    def _batches(self, requests: list[Request]) -> list[Tensor]:
        """What HFLM is about to run the model on: (B, S) each, padded on the right."""
        order = Collator(
            requests, sort_fn=lambda request: (-len(request[1] + request[2]), tuple(request[1] + request[2])),
            group_by="contexts", group_fn=_read,
        )  # fmt: skip
        batches = []
        for chunk in order.get_batched(n=0, batch_fn=self._batch_scheduler):
            rows = [torch.tensor(_read(request)[-self.max_length :]) for request in chunk]
            batches.append(pad_sequence(rows, batch_first=True))
        return batches

    def _batch_scheduler(self, position: int, requests: Sequence[Request]) -> int:
        """How many of the requests, longest first, are the batch that `position` is in; asked at every one in turn."""
        if position == 0:
            self._begin = 0
        size = self._batch(len(_read(requests[self._begin])))
        if position == self._begin + size - 1:
            self._begin += size
        return size

    def _logits(self, batches: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Each batch and its logits (B, S, vocabulary)."""
        with progress(None, self._what, "window", total=sum(map(len, batches))) as bar:
            for part in self._passes(batches):
                for batch, hidden in last_hidden_states(self._language_model, part, store=self._store):
                    yield batch, self._language_model.logits(hidden)
                    bar.update(len(batch))

    def _passes(self, batches: list[Tensor]) -> Iterator[list[Tensor]]:
        """The batches of each pass over a streamed model; of one in memory each is its own."""
        room = 0 if self._store is None else max(self._store.room, AT_LEAST)
        embedding = self._language_model.model.get_input_embeddings().weight
        token = embedding.shape[1] * embedding.element_size()
        held: list[Tensor] = []
        for batch in batches:
            if held and (sum(map(Tensor.numel, held)) + batch.numel()) * token > room:
                yield held
                held = []
            held.append(batch)
        if held:
            yield held

    def _model_call(self, inps: Tensor, **_options) -> Tensor:
        batch, logits = next(self._waiting)
        if not torch.equal(batch, inps.cpu()):
            raise AssertionError("lm_eval batches requests in another way than it did")
        return logits.to(inps.device)


def _read(request: Request) -> list[int]:
    """The tokens of a request that the model reads: all but the last."""
    return request[1] + request[2][:-1]
