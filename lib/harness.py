"""The model at hand as lm_eval, the evaluation harness, sees it; imported where a task is evaluated, and only there."""

import copy
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace

import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from . import ranks
from .activations import Store
from .blockwise import last_hidden_states
from .errors import RunError, reason_of
from .evaluate import logits_in_parts
from .load import context_length
from .model import LanguageModel
from .progress import progress

Request = tuple[tuple[str, str] | None, list[int], list[int]]  # texts, and tokens of the context and of what follows it
Row = tuple[tuple[int, ...], list[int]]  # tokens that the model reads, and the numbers of the requests they answer
Batch = tuple[list[Row], Tensor]  # rows, and their tokens (B, S), padded on the right
Answer = tuple[float, bool]  # the log-likelihood in nats, and whether greedy decoding gives it
AT_LEAST = 2**28  # bytes of hidden states that a pass over a streamed model carries, however little memory there is


class HarnessModel(HFLM):
    """lm_eval's own model class around a LanguageModel: its tokens and prompts, scored on our forward passes.

    batch(length) is how many requests of so many tokens are one batch; the longest come first. `bos` goes in front of
    every text, in place of what the tokenizer puts there. A streamed model is passed over once for all requests, or as
    often as their hidden states need to fit into `store`. The requests are shared by the ranks, and every rank has all
    answers. `cut` counts requests that were longer than the model's window and lost their beginning, as the harness
    does it. `failed` says of each task with a request that cannot be scored why; its answers mean nothing.
    """

    def __init__(
        self, model: LanguageModel, batch: Callable[[int], int], *, bos: int | None = None, store: Store | None = None,
        what: str = "zero-shot",
    ):  # fmt: skip
        self._language_model, self._batch, self._bos = model, batch, bos
        self._store, self._what, self.cut = store, what, 0
        self.failed: dict[str, str] = {}
        self.computing = False  # whether the model is at work: what is raised then is of the model and not of a task
        self._known: dict[bytes, Answer] = {}  # by a digest of the request: no answer is computed twice
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

    @property
    def max_length(self) -> int:
        """The model's window; where its configuration does not say, the harness's own guess."""
        return context_length(self.config) or super().max_length

    def loglikelihood(self, requests: list, disable_tqdm: bool = True) -> list[Answer]:
        """Of each request's continuation after its context."""
        asked = [(request.args, *self._tokens(*request.args)) for request in requests]
        return self._loglikelihood_tokens(asked, owners=[request.task_name for request in requests])

    def _tokens(self, context: str, continuation: str) -> tuple[list, list[int]]:
        """Of a context, for which BOS or EOS stands where it is empty, and of what follows."""
        if context:
            return self._encode_pair(context, continuation)
        found, prefix = self.tok_encode(continuation, add_special_tokens=False), self.prefix_token_id
        return (found[:1], found[1:]) if found[:1] == [prefix] else ([prefix], found)

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
        values = self._loglikelihood_tokens(windows, owners=[requests[owner].task_name for owner in owners])
        for owner, (value, _) in zip(owners, values, strict=True):
            sums[owner] += value
        return sums

    def generate_until(self, requests: list, disable_tqdm: bool = True) -> list[str]:
        """The model's own continuation of each request."""
        if self._language_model.streamed:
            raise RunError("--stream: a streamed model gives log-likelihoods and generates no text")
        answers = [""] * len(requests)
        for task in dict.fromkeys(request.task_name for request in requests):
            numbers = [number for number, request in enumerate(requests) if request.task_name == task]
            for number, answer in zip(numbers, self._generated(task, [requests[n] for n in numbers]), strict=True):
                answers[number] = answer
        return answers

    def _generated(self, task: str, requests: list) -> list[str]:
        """A task's answers, of which every rank writes a share; none, and a reason, where a rank cannot."""
        share, said, reason = requests[ranks.rank() :: ranks.world_size()], [], None
        self.batch_size_per_gpu = self._batch(self.max_length)
        try:
            if self.eot_token_id is None:
                reason = "the model's tokenizer has no EOS, with which what it writes would end"
            elif share:
                said = super().generate_until(share, disable_tqdm=True)
        except torch.OutOfMemoryError:
            raise
        except (AssertionError, ValueError, RuntimeError) as error:  # such as more tokens than the window has
            reason = reason_of(error)
        finally:
            self.batch_size_per_gpu = "auto"
        answers = [""] * len(requests)
        for rank, (part, failed) in enumerate(ranks.all_gather((said, reason))):
            if failed:
                self.failed.setdefault(task, failed)
            else:
                answers[rank :: ranks.world_size()] = part
        return answers

    def _loglikelihood_tokens(
        self, requests: list[Request], *, owners: Sequence[str] | None = None, **_options
    ) -> list[Answer]:
        """Every rank's answers to its share, on every rank; `owners` are the tasks that the requests are of."""
        owned = list(zip(owners or [""] * len(requests), requests, strict=True))
        for owner, request in owned:
            if owner not in self.failed and (reason := self._unfit(request)):
                self.failed[owner] = reason
        keys = [_key(request) for request in requests]
        rows: dict[tuple[int, ...], list[int]] = {}  # what the model reads, and the requests that it answers
        for number, (owner, request) in enumerate(owned):
            if owner not in self.failed and keys[number] not in self._known:
                read = tuple(_read(request))
                rows.setdefault(read, []).append(number)
                self.cut += len(read) > self.max_length
        share_of = ranks.balance([len(read) for read in rows])
        share = [row for row, rank in zip(rows.items(), share_of, strict=True) if rank == ranks.rank()]
        found: dict[int, Answer] = {}
        self.computing = True
        for part in ranks.all_gather(dict(self._answers(share, requests))):
            found |= part
        self.computing = False
        if not all(math.isfinite(value) for value, _ in found.values()):
            raise RunError(f"{self._what}: log-likelihoods are NaN or infinite; try --dtype float32 or bfloat16")
        self._known |= {keys[number]: answer for number, answer in found.items()}
        return [self._known.get(key, (0.0, False)) for key in keys]

    def _unfit(self, request: Request) -> str | None:
        """Why a request cannot be scored, if it cannot."""
        texts, context, continuation = request
        if context == [None]:
            return "a text has nothing before it, and the model's tokenizer no BOS and no EOS"
        if not (context and continuation):
            return f"the model's tokenizer gives no token for a part of {texts!r}"
        if len(continuation) > self.max_length:
            window = f"the model's window of {self.max_length}"
            return f"a continuation of {len(continuation)} tokens is longer than {window}"
        return None

    def _answers(self, rows: list[Row], requests: list[Request]) -> Iterator[tuple[int, Answer]]:
        """The number and the answer of each request that the rows answer."""
        with progress(None, self._what, "window", total=len(rows)) as bar:
            for part in self._passes(self._batches(rows)):
                padded = [tokens for _, tokens in part]
                states = last_hidden_states(self._language_model, padded, store=self._store)
                for (batch, _), (_, hidden) in zip(part, states, strict=True):
                    yield from self._scores(batch, requests, hidden)
                    bar.update(len(batch))

    def _batches(self, rows: list[Row]) -> list[Batch]:
        """Rows of about one length, the longest first."""
        rest, batches = sorted(rows, key=lambda row: len(row[0]), reverse=True), []
        while rest:
            size = self._batch(len(rest[0][0]))
            batch, rest = rest[:size], rest[size:]
            tokens = [torch.tensor(read[-self.max_length :]) for read, _ in batch]
            batches.append((batch, pad_sequence(tokens, batch_first=True)))
        return batches

    def _passes(self, batches: list[Batch]) -> Iterator[list[Batch]]:
        """The batches of each pass over a streamed model; of one in memory each is its own."""
        room = 0 if self._store is None else max(self._store.available, AT_LEAST)
        embedding = self._language_model.model.get_input_embeddings().weight
        token = embedding.shape[1] * embedding.element_size()
        held: list[Batch] = []
        for batch in batches:
            if held and sum(tokens.numel() for _, tokens in [*held, batch]) * token > room:
                yield held
                held = []
            held.append(batch)
        if held:
            yield held

    def _scores(self, batch: list[Row], requests: list[Request], hidden: Tensor) -> Iterator[tuple[int, Answer]]:
        """The same for a batch with last hidden states (B, S, d): logits are computed where a continuation is read."""
        scored, states = [], []
        for row, (read, numbers) in enumerate(batch):
            end = min(len(read), self.max_length)
            for number in numbers:
                scored.append((number, torch.tensor(requests[number][2])))
                states.append(hidden[row, end - len(scored[-1][1]) : end])
        wanted, found = torch.cat([continuation for _, continuation in scored]), []
        for logits in logits_in_parts(self._language_model, torch.cat(states)[None]):
            here, wanted = wanted.tensor_split([logits.shape[1]])
            log_probs = F.log_softmax(logits[0], dim=-1, dtype=self.softmax_dtype)
            here = here.to(log_probs.device)
            found.append((log_probs.gather(1, here[:, None])[:, 0], log_probs.argmax(-1) == here))
        lengths = [len(continuation) for _, continuation in scored]
        values, greedy = (torch.cat(kind).cpu().split(lengths) for kind in zip(*found, strict=True))
        for (number, _), value, same in zip(scored, values, greedy, strict=True):
            yield number, (float(value.sum()), bool(same.all()))


def _read(request: Request) -> list[int]:
    """The tokens of a request that the model reads: all but the last."""
    return request[1] + request[2][:-1]


def _key(request: Request) -> bytes:
    return hashlib.blake2b(repr(request[1:]).encode(), digest_size=16).digest()
