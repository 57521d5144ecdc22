"""The one loop over blocks: capture, collect, hand over, propagate (METHODS: Wanda, SparseGPT, sequentially).

Every block is called with exactly the arguments the model itself passed to it, captured once for each batch.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress

import torch
from torch import Tensor, nn

from . import ranks
from .activations import Activations, Store
from .collector import Collector, StopForward
from .errors import RunError
from .masks import Pattern
from .model import LanguageModel, Matrix, replaced_forward
from .progress import progress
from .pruners import PRUNERS, Pruner
from .stats import InputStats
from .stopwatch import Stopwatch

log = logging.getLogger(__name__)

PROBE_TOKENS = 16


def prune_model(
    model: LanguageModel,
    pruner: Pruner,
    targets: dict[str, float],
    pattern: Pattern,
    windows: Tensor | None = None,
    *,
    batch_size: int = 1,
    clock: Stopwatch | None = None,
    events: list[dict] | None = None,
    store: Store | None = None,
    done: int = 0,
    commit: Callable[[int, dict[str, InputStats], list[dict]], None] | None = None,
) -> None:
    """Prune every matrix in place to its target, block by block, on the stream of the blocks already pruned.

    windows (nsamples, seqlen) token ids, of which each rank takes its share; not read by a pruner that needs nothing
    of its input. Retries and fallbacks are appended to `events`. The first `done` blocks are pruned already and only
    run through; `commit(block, statistics, events)` is called when one more is. Raises RunError with the matrix's name
    for NaN or infinity.
    """
    clock, events = clock or Stopwatch(), [] if events is None else events
    needs = pruner.needs if any(targets.values()) else "nothing"
    blocks = walk(model, windows, needs, batch_size=batch_size, clock=clock, store=store, done=done)
    for block, matrices, stats in blocks:
        share = sum(targets[m.name] * m.size for m in matrices) / max(1, sum(m.size for m in matrices))
        log.info("block %d of %d: pruning %d matrices to %.4f", block + 1, len(model.blocks), len(matrices), share)
        found: list[dict] = []
        with clock("prune"):
            owners = _owners(matrices, stats)
            for matrix, owner in zip(matrices, owners, strict=True):
                if owner == ranks.rank() and targets[matrix.name] > 0:
                    _prune_matrix(matrix, pruner, stats.get(matrix.name), targets[matrix.name], pattern, found)
            for matrix, owner in zip(matrices, owners, strict=True):
                matrix.write(ranks.send_around(matrix.weight, owner))
        found = [event for events_of_rank in ranks.gather(found) for event in events_of_rank]
        events += found
        if commit is not None:
            with clock("commit"):
                commit(block, stats, found)


def _owners(matrices: list[Matrix], stats: dict[str, InputStats]) -> list[int]:
    """The rank that prunes each matrix; those that share statistics stay together, and so does what is derived."""
    shared = [id(stats.get(matrix.name, matrix)) for matrix in matrices]
    costs: dict[int, float] = {}
    for matrix, key in zip(matrices, shared, strict=True):
        costs[key] = costs.get(key, 0.0) + matrix.size * matrix.shape[1]
    owner = dict(zip(costs, ranks.deal(list(costs.values())), strict=True))
    return [owner[key] for key in shared]


def _prune_matrix(
    matrix: Matrix, pruner: Pruner, stats: InputStats | None, target: float, pattern: Pattern, events: list[dict]
) -> None:
    def note(message: str) -> None:
        log.warning("%s: %s", matrix.name, message)
        events.append({"matrix": matrix.name, "message": message})

    if stats is not None and not stats.sum_squares.isfinite().all():
        raise RunError(f"{matrix.name}: its calibration input holds NaN or infinity; try --dtype float32 or bfloat16")
    if stats is None and pruner.needs != "nothing":
        note("saw no calibration token; pruned by magnitude")
        pruner = PRUNERS["magnitude"]
    try:
        weight = pruner.prune(matrix.weight, stats, target, pattern)
    except RunError as error:
        raise RunError(f"{matrix.name}: {error}") from error
    finally:
        while stats is not None and stats.events:
            note(stats.events.pop(0))
    if not weight.isfinite().all():
        raise RunError(f"{matrix.name}: holds NaN or infinity after pruning; try --dtype float32 or bfloat16")
    matrix.write(weight)


def walk(
    model: LanguageModel,
    windows: Tensor | None,
    needs: str,
    *,
    batch_size: int = 1,
    clock: Stopwatch | None = None,
    store: Store | None = None,
    done: int = 0,
) -> Iterator[tuple[int, list[Matrix], dict[str, InputStats]]]:
    """Yield (block, its matrices, statistics of their inputs by name), from the block `done` to the last.

    Whoever iterates may change the block's weights; the next block's inputs come from the changed block. The blocks
    before `done` are run through as they are. A matrix that saw no token on any rank has no statistics. With needs
    "nothing" no token is run and none has any.
    """
    clock = clock or Stopwatch()
    stream = None
    if needs != "nothing":
        with clock("calibrate"):
            stream = Stream(model, ranks.mine(windows), batch_size, store)
    with progress(range(0 if stream else done, len(model.blocks)), "blocks", "block") as bar:
        for block in bar:
            with model.resident_block(block):
                if block >= done:
                    matrices, stats = model.matrices_of(block), {}
                    if stream is not None:
                        bar.set_description("statistics")
                        with clock("calibrate"), clock("statistics"):
                            stats = _over_ranks(stream.collect(block, matrices, needs), matrices, needs)
                    bar.set_description("pruning")
                    yield block, matrices, stats
                if stream is not None and block + 1 < len(model.blocks):
                    bar.set_description("propagation")
                    with clock("calibrate"), clock("propagation"):
                        stream.advance(block)


def _over_ranks(stats: dict[str, InputStats], matrices: list[Matrix], needs: str) -> dict[str, InputStats]:
    """The statistics summed over the ranks, each of which saw its own windows."""
    if ranks.size() == 1:
        return stats
    readers: dict[int, list[str]] = {}
    for matrix in matrices:
        if matrix.name in stats:
            readers.setdefault(id(stats[matrix.name]), []).append(matrix.name)
    # An expert may have seen tokens on some ranks only; what is read together is the same on all that saw any.
    together = {tuple(names): None for each in ranks.gather([*readers.values()]) for names in each}
    matrix_of = {matrix.name: matrix for matrix in matrices}
    summed = {}
    for names in together:
        matrix = matrix_of[names[0]]
        one = stats.get(names[0]) or InputStats.empty(needs, matrix.shape[1], matrix.weight.device)
        one.add_up(ranks.add_up)
        summed |= dict.fromkeys(names, one)
    return summed


class Stream:
    """The calibration windows on their way through the blocks: one hidden state a batch, updated in place.

    Making one checks, on a few tokens, that the blocks called one by one give what the model's own forward
    gives, and raises RunError for a model of which that is not true.
    """

    def __init__(self, model: LanguageModel, windows: Tensor, batch_size: int, store: Store | None = None):
        self.model, self._windows = model, windows.split(batch_size)
        self._check(windows[:1, :PROBE_TOKENS])
        self.hidden = Activations(model.device, len(windows), store)
        self.calls: list[list[tuple[tuple, dict]]] = []  # [batch][block] -> arguments beside the hidden state
        for batch in self._windows:
            hidden, calls = self._capture(batch)
            self.hidden.append(hidden)
            self.calls.append(_share(calls, self.calls[0]) if self.calls else calls)

    @torch.no_grad()
    def _check(self, tokens: Tensor) -> None:
        """Run the model on a few tokens, watch each block, and compare with what `_capture` and `advance` rely on.

        Each block must read the very output of the one before it, and get the arguments that a captured call has.
        Keeps the part of each block's output that is not its hidden state.
        """
        inputs: list[Tensor] = []  # of each block: hidden state in, other arguments, whole output
        given: list[tuple[tuple, dict]] = []
        outputs: list = []

        def before(_module, args, kwargs):
            hidden, call = _split(args, kwargs)
            inputs.append(hidden)
            given.append(call)

        with ExitStack() as stack:
            for index, block in enumerate(self.model.blocks):
                stack.enter_context(self.model.resident_in_forward(index))
                # Outside of hooks that others set: these are part of the block.
                stack.callback(block.register_forward_pre_hook(before, with_kwargs=True, prepend=True).remove)
                stack.callback(block.register_forward_hook(lambda _m, _a, out: outputs.append(out)).remove)
            self.model.hidden_states(tokens)
        self._tails = [out[1:] if isinstance(out, tuple) else None for out in outputs]
        if len(outputs) == len(self.model.blocks):
            first, calls = self._capture(tokens)
            if _same(calls, given) and _same(inputs, [first, *map(_hidden_of, outputs[:-1])]):
                return
        raise RunError(
            f"--model {self.model.name}: {type(self.model.model).__name__} cannot be pruned block by block: its "
            "blocks called one after the other do not give what the whole model gives; prune it with magnitude"
        )

    @torch.no_grad()
    def _capture(self, tokens: Tensor) -> tuple[Tensor, list[tuple[tuple, dict]]]:
        """The first block's input and every block's other arguments, each block passing its input through."""
        first: list[Tensor] = []
        calls: list[tuple[tuple, dict]] = []

        def recorder(tail):
            def forward(*args, **kwargs):
                hidden, call = _split(args, kwargs)
                if not first:
                    first.append(hidden)
                calls.append(call)
                if len(calls) == len(self.model.blocks):
                    raise StopForward
                return hidden if tail is None else (hidden, *tail)

            return forward

        with ExitStack() as stack:
            for block, tail in zip(self.model.blocks, self._tails, strict=True):
                stack.enter_context(replaced_forward(block, recorder(tail)))
            with suppress(StopForward):
                self.model.hidden_states(tokens)
        return first[0], calls

    @torch.no_grad()
    def collect(self, block: int, matrices: list[Matrix], needs: str) -> dict[str, InputStats]:
        """Run every batch through the block as it stands and return its inputs' statistics by matrix name."""
        collector = Collector(matrices, needs)
        module = self.model.blocks[block]
        for hidden, calls in zip(self.hidden, self.calls, strict=True):
            with collector.batch(module):
                _call(module, hidden, calls[block])
        return collector.finish()

    @torch.no_grad()
    def advance(self, block: int) -> None:
        """Replace every batch's hidden state by the block's output."""
        for i, hidden in enumerate(self.hidden):
            self.hidden[i] = _hidden_of(_call(self.model.blocks[block], hidden, self.calls[i][block]))

    @torch.no_grad()
    def finish(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield each batch's tokens (B, S) and last hidden state (B, S, d), once it went through every block."""
        for tokens, hidden in zip(self._windows, self.hidden, strict=True):
            with ExitStack() as stack:
                for block, tail in zip(self.model.blocks, self._tails, strict=True):
                    output = hidden if tail is None else (hidden, *tail)
                    stack.enter_context(replaced_forward(block, lambda *_a, output=output, **_k: output))
                last = self.model.hidden_states(tokens)
            yield tokens, last


def last_hidden_states(
    model: LanguageModel, windows: Tensor, batch_size: int, store: Store | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches of windows (B, S) and their last hidden states (B, S, d), after the final norm.

    Of a model in memory batch by batch; of one that is not, all batches through one block, then through the next.
    """
    if not model.streamed:
        for batch in windows.split(batch_size):
            yield batch, model.hidden_states(batch)
        return
    stream = Stream(model, windows, batch_size, store)
    for block in progress(range(len(model.blocks)), "evaluation", "block"):
        with model.resident_block(block):
            stream.advance(block)
    yield from stream.finish()


def _split(args: tuple, kwargs: dict) -> tuple[Tensor, tuple[tuple, dict]]:
    """A block's call as its hidden state and the rest."""
    kwargs = dict(kwargs)
    hidden = args[0] if args else kwargs.pop("hidden_states")
    return hidden, (args[1:], kwargs)


def _call(block: nn.Module, hidden: Tensor, call: tuple[tuple, dict]):
    args, kwargs = call
    return block(hidden, *args, **kwargs)


def _hidden_of(output) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _share(new, old):
    """`new` with every tensor that equals its counterpart in `old` replaced by it: batches share their masks."""
    if isinstance(new, Tensor) and isinstance(old, Tensor):
        same = new is old or (new.shape == old.shape and new.dtype == old.dtype and torch.equal(new, old))
        return old if same else new
    if type(new) is not type(old):
        return new
    if isinstance(new, dict):
        return {key: _share(value, old.get(key)) for key, value in new.items()}
    if type(new) in (list, tuple) and len(new) == len(old):
        return type(new)(_share(a, b) for a, b in zip(new, old, strict=True))
    return new


def _same(one, other) -> bool:
    """Whether two calls' arguments are the same, tensor by tensor; of other objects only the kind is compared."""
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        if not (isinstance(one, Tensor) and isinstance(other, Tensor)) or one.shape != other.shape:
            return False
        return torch.allclose(one, other.to(one.device, one.dtype), rtol=0, atol=0, equal_nan=True)
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(value, other[key]) for key, value in one.items())
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_same, one, other))
    return one == other if isinstance(one, (bool, int, float, str)) else True
