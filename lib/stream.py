"""Windows of tokens on their way through the blocks, one after the other.

Every block is called with exactly the arguments the model itself passed to it, captured once for each batch.
"""

import copy
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

import torch
from torch import Tensor, nn

from . import ranks
from .activations import Activations, Store
from .collector import Collector, StopForward
from .errors import RunError
from .model import LanguageModel, Matrix, replaced_forward
from .progress import progress
from .stats import InputStats

PROBE_TOKENS = 16


class Beside:
    """The dense model beside one block that is pruned in stages: its stream, and a copy of the block as it was.

    advances  whether the stream leaves the block with the next statistics: with those of the last stage
    writer    the matrix whose output the block adds last, to what is then the block's output; None where there is no
              such one
    """

    def __init__(self, stream: "Stream", block: int):
        self.stream, self._block, self.advances = stream, block, False
        self.writer: Matrix | None = None
        module = stream.model.blocks[block]
        self._module = copy.deepcopy(module)
        self.twins = dict(zip(module.modules(), self._module.modules(), strict=True))

    def output(self, batch: int) -> Tensor:
        """The dense block's output for one batch, (B, S, d)."""
        return _hidden_of(_call(self._module, self.stream.hidden[batch], self.stream.calls[batch][self._block]))


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

    def copy(self) -> "Stream":
        """Another stream of the same windows, at the same place."""
        other = copy.copy(self)
        other.hidden = self.hidden.copy()
        return other

    def __len__(self) -> int:
        """Batches."""
        return len(self.hidden)

    def output(self, block: int, batch: int) -> Tensor:
        """The block's output for one batch, (B, S, d)."""
        return _hidden_of(_call(self.model.blocks[block], self.hidden[batch], self.calls[batch][block]))

    @torch.no_grad()
    def collect(
        self, block: int, matrices: list[Matrix], needs: str, dense: "Beside | None" = None
    ) -> dict[str, InputStats]:
        """Run every batch through the block as it stands and return these matrices' inputs' statistics by name.

        What they read in the `dense` model, for the same tokens, goes into the cross Gram.
        """
        writer = dense.writer if dense is not None and dense.writer in matrices else None
        collector = Collector(matrices, needs, cross=dense is not None, whole=writer is not None)
        module = self.model.blocks[block]
        for batch in range(len(self)):
            with _watched([writer.module, dense.twins[writer.module]] if writer else []) as calls:
                if dense is not None:
                    with collector.reference(dense.twins, dense.advances):
                        beside = dense.output(batch)
                with collector.batch(module):
                    output = self.output(block, batch)
            if writer is not None:
                (x, written), (_, written_beside) = calls[writer.module], calls[dense.twins[writer.module]]
                gap = (beside - output).flatten(0, -2) - (written_beside - written).flatten(0, -2)  # before it wrote
                collector.stats[writer.name].add_residual(gap, x)
            if dense is not None and dense.advances:
                dense.stream.hidden[batch] = beside
        return collector.finish()

    @torch.no_grad()
    def writer(self, block: int, stage: list[Matrix]) -> Matrix | None:
        """The one matrix of the stage, if the block's output is its output added to something that ignores it."""
        if len(stage) != 1 or stage[0].expert is not None:
            return None

        def nudge(_module: nn.Module, _args: tuple, output: Tensor) -> Tensor:
            nudges.append(torch.randn_like(output) * output.std())
            return output + nudges[-1]

        nudges: list[Tensor] = []
        before = self.output(block, 0)
        hook = stage[0].module.register_forward_hook(nudge)
        moved = (self.output(block, 0) - before).flatten(0, -2).float()  # whose norm half precision could not hold
        hook.remove()
        added = nudges[0].flatten(0, -2).float()
        # In half precision the sum is rounded; anything but a plain sum is further off than that.
        plain = added.shape == moved.shape and float((moved - added).norm() / added.norm()) < 0.02
        return stage[0] if ranks.from_first(lambda: plain) else None

    @torch.no_grad()
    def stages(self, block: int, matrices: list[Matrix]) -> list[list[Matrix]]:
        """The matrices of a block by the order in which a pass reads their inputs.

        Together are those that read the same tensor, and all experts' of one kind; the same on every rank.
        """
        stage_of_kind: dict[str, int] = {}
        seen: dict[tuple, int] = {}  # tensor -> stage
        alive: list[Tensor] = []  # so that ids stay unique
        kinds = {(m.module, m.parameter): re.sub(r"\.\d+(?=\.|$)", ".*", m.name) for m in matrices}

        def reached(module: nn.Module, args: tuple, kwargs: dict) -> None:
            x = (*args, *kwargs.values())[0]
            alive.append(x)
            for (owner, parameter), kind in kinds.items():
                if owner is module and kind not in stage_of_kind:
                    # Of fused experts the second tensor's input comes from the first.
                    key = (id(x), x._version, parameter)
                    stage_of_kind[kind] = seen.setdefault(key, len(set(seen.values())))

        with ExitStack() as stack:
            for module in dict.fromkeys(matrix.module for matrix in matrices):
                stack.callback(module.register_forward_pre_hook(reached, with_kwargs=True).remove)
            self.output(block, 0)
        stage_of_kind = ranks.from_first(lambda: stage_of_kind)
        last = max(stage_of_kind.values(), default=0)
        stages: list[list[Matrix]] = [[] for _ in range(last + 1)]
        for matrix in matrices:
            stages[stage_of_kind.get(kinds[matrix.module, matrix.parameter], last)].append(matrix)
        return stages

    @torch.no_grad()
    def advance(self, block: int) -> None:
        """Replace every batch's hidden state by the block's output."""
        for batch in range(len(self)):
            self.hidden[batch] = self.output(block, batch)

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


@contextmanager
def _watched(modules: list[nn.Module]) -> Iterator[dict[nn.Module, tuple[Tensor, Tensor]]]:
    """module -> the first argument and the output of its last call."""
    calls: dict[nn.Module, tuple[Tensor, Tensor]] = {}
    with ExitStack() as stack:
        for module in modules:
            hook = module.register_forward_hook(lambda m, args, output: calls.__setitem__(m, (args[0], output)))
            stack.callback(hook.remove)
        yield calls


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
