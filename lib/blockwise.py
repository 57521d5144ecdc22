"""Windows of tokens on their way through the blocks, one after the other.

Every block is called with exactly the arguments that the model itself passes to it.
"""

import copy
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only

from . import ranks
from .activations import Activations, Store
from .calls import Call, same_tensors, same_values, share_tensors
from .collector import Collector
from .errors import RunError
from .model import LanguageModel, Matrix
from .progress import progress
from .route import Containers, Leaf, Route, RouteRecorder, filled, split
from .stats import InputStats

ENTRY: Leaf = (-1, 0)  # the hidden state that the first visit is called with


class DenseReference:
    """The dense reference of one block that is pruned in stages: the dense model's pass, and a copy of the block.

    advances         whether the pass leaves the block with the next statistics: those of the last stage
    dense_modules    module of the block -> its dense copy
    residual_writer  the matrix whose output the block adds last, to the residual stream; None where there is none
    """

    def __init__(self, blockwise: "BlockwisePass", visit: int):
        self.blockwise, self._visit, self.advances = blockwise, visit, False
        self.residual_writer: Matrix | None = None
        module = blockwise.block(visit)
        self._module = copy.deepcopy(module)
        self.dense_modules = dict(zip(module.modules(), self._module.modules(), strict=True))

    def leaves(self, batch: int) -> list:
        """The dense block's output leaves for one batch."""
        return self.blockwise.leaves(self._visit, batch, self._module)


class BlockwiseError(RunError):
    """A model whose blocks cannot be called one by one."""


class BlockwisePass:
    """The calibration windows on their way through the blocks: what each visit gives, a batch at a time.

    windows (n, seqlen), cut into batches; or the batches (B, S) themselves, of whatever lengths, the longest first.
    Making one follows the model's own forward pass on the first window, and checks on it that the blocks called one by
    one give what that gives; raises RunError for a model of which that is not true.

    route    the visits in order, each a call of one block, and what goes from one to the other
    hidden   the hidden state that the last visit gave
    batches  the windows (B, S)
    windows  how many there are; statistics are of the first `stats_windows` only

    What no later visit reads makes room for what comes, unless the pass is to `keep` all.
    """

    def __init__(
        self, model: LanguageModel, windows: Tensor | Sequence[Tensor], batch_size: int = 1, store: Store | None = None,
        route: Route | None = None, keep: bool = False, stats_windows: int | None = None,
    ):  # fmt: skip
        self.model, self.batches, self._store, self._keep = model, _batches(windows, batch_size), store, keep
        self.windows = sum(map(len, self.batches))
        self._stats_batches = len(self.batches) if stats_windows is None else -(-stats_windows // batch_size)
        self.route = _follow(model, self.batches[0][:1]) if route is None else route
        self.hidden = Activations(model.device, _as_many_as_the_first(self.batches), store)
        self._held: dict[Leaf, Activations] = {ENTRY: self.hidden}  # what the model goes on with
        self._calls: list[list[Call | None]] = []  # [batch][visit] -> arguments beside the hidden state, where kept
        for tokens in self.batches:
            with torch.no_grad():
                calls, _ = self.route.calls(model, tokens, self._nothing, end=None if self.route.plain else 0)
            hidden, calls = split(calls[0])[0], [split(call)[1] for call in calls]
            self.hidden.put(len(self.hidden), hidden)
            if self.route.plain:
                self._calls.append(self._kept(calls))

    @staticmethod
    def _nothing(_leaf: Leaf) -> None:
        return None

    def _kept(self, calls: list[Call]) -> list[Call | None]:
        """A batch's calls, with every tensor that they share with the first batch's; none where one would take memory
        that activations do not have either: it is then made again when its turn comes.
        """
        if not self._calls:
            return calls
        shared, first = share_tensors(calls, self._calls[0]), self._calls[0]
        if self._store is None:
            return shared
        return [call if same_tensors(call, old) else None for call, old in zip(shared, first, strict=True)]

    @property
    def visits(self) -> list[int]:
        """The block of each visit, in the order of the model's own forward."""
        return self.route.visits

    def block(self, visit: int) -> nn.Module:
        return self.model.blocks[self.visits[visit]]

    def copy(self) -> "BlockwisePass":
        """Another pass of the same windows, at the same visit."""
        other = copy.copy(self)
        other.hidden = self.hidden.copy()
        other._held = {leaf: other.hidden if held is self.hidden else held.copy() for leaf, held in self._held.items()}
        return other

    def __len__(self) -> int:
        """Batches."""
        return len(self.hidden)

    def arguments(self, visit: int, batch: int, given: Callable[[Leaf, int], Tensor | None] | None = None) -> Call:
        """What the model calls the block with on that visit, all visits before it having been received: made of what
        `given(leaf, batch)` is, which is what was received unless something else stands in for it.
        """
        given = given or self.given
        kept = self._calls[batch][visit] if self.route.plain else None
        if kept is None:
            tokens = self.batches[batch]
            calls, _ = self.route.calls(self.model, tokens, lambda leaf: given(leaf, batch), end=visit)
            if not self.route.plain:
                return calls[visit]
            _, kept = split(calls[visit])
        return filled(kept, given(self._output_of(visit - 1), batch))

    def given(self, leaf: Leaf, batch: int) -> Tensor | None:
        """The value of a leaf that was received and is still held, else None."""
        held = self._held.get(leaf)
        return None if held is None or batch >= len(held) else held[batch]

    def leaves(self, visit: int, batch: int, block: nn.Module | None = None) -> list:
        """The visit's output leaves for one batch; `block` stands in for the model's own."""
        return self.route.call(visit, block or self.block(visit), self.arguments(visit, batch))

    def output(self, visit: int, batch: int) -> Tensor:
        """The block's output for one batch, (B, S, d)."""
        return self.leaves(visit, batch)[self.route.hidden[visit]]

    def receive(self, visit: int, batch: int, leaves: list) -> None:
        """Keep those of a visit's output leaves that later visits read."""
        if batch == 0:
            self._allocate(visit)
        for place, value in enumerate(leaves):
            if (visit, place) in self._held:
                self._held[visit, place].put(batch, value)

    def release(self, visit: int) -> None:
        """Free a visit's output leaves, in a pass that keeps all."""
        self._held = {leaf: held for leaf, held in self._held.items() if leaf[0] != visit}

    def _output_of(self, visit: int) -> Leaf:
        return ENTRY if visit < 0 else self.route.output_of(visit)

    def _last_read(self, leaf: Leaf) -> int:
        return 0 if leaf == ENTRY else self.route.last_read(leaf)

    def _allocate(self, visit: int) -> None:
        """Allocate the visit's output leaves; reuses the buffers of leaves that no later visit reads."""
        free = []
        if not self._keep:
            self._held = {leaf: held for leaf, held in self._held.items() if self._last_read(leaf) >= visit}
            free = [held for leaf, held in self._held.items() if self._last_read(leaf) == visit]
        for place, like in enumerate(self.route.leaves[visit]):
            leaf = visit, place
            if leaf in self.route.same_as or not (self._last_read(leaf) > visit or leaf == self._output_of(visit)):
                continue
            found = next((held for held in free if held.same_layout(like)), None)
            free = [held for held in free if held is not found]
            self._held[leaf] = found or self.hidden.new_empty()
        self.hidden = self._held[self._output_of(visit)]

    @torch.no_grad()
    def collect(
        self, visit: int, matrices: list[Matrix], needs: str, dense: "DenseReference | None" = None
    ) -> tuple[dict[str, InputStats], dict[str, str]]:
        """Run every batch through the block as it stands and return these matrices' inputs' statistics by name, and
        of those that have none why.

        What they read in the `dense` model, for the same tokens, goes into the cross Gram.
        """
        residual_writer = dense.residual_writer if dense is not None and dense.residual_writer in matrices else None
        collector = Collector(matrices, needs, cross=dense is not None, whole=residual_writer is not None)
        module, hidden = self.block(visit), self.route.hidden[visit]
        watched = [residual_writer.module, dense.dense_modules[residual_writer.module]] if residual_writer else []
        for batch in range(self._stats_batches):
            with _watched(watched) as calls:
                if dense is not None:
                    with collector.reference(dense.dense_modules, dense.advances):
                        dense_leaves = dense.leaves(batch)
                with collector.batch(module):
                    output = self.output(visit, batch)
            if batch == 0 and collector.not_called:
                with collector.watch_products():
                    self.output(visit, batch)
            if residual_writer is not None:
                (x, written), (_, dense_written) = map(calls.get, watched)
                gap = (dense_leaves[hidden] - output).flatten(0, -2)
                gap -= (dense_written - written).flatten(0, -2)  # before it wrote
                collector.stats[residual_writer.name].add_residual(gap, x)
            if dense is not None and dense.advances:
                dense.blockwise.receive(visit, batch, dense_leaves)
        if dense is not None and dense.advances:
            for batch in range(self._stats_batches, len(self)):
                dense.blockwise.receive(visit, batch, dense.leaves(batch))
        return collector.finish(), collector.missing_reasons(module)

    @torch.no_grad()
    def residual_writer(self, visit: int, stage: list[Matrix]) -> Matrix | None:
        """The one matrix of the stage, if the block's output is its output added to something that ignores it."""
        if len(stage) != 1 or stage[0].expert is not None or not self._used_once(stage[0], visit):
            return None

        def nudge(_module: nn.Module, _args: tuple, output: Tensor) -> Tensor:
            nudges.append(torch.randn_like(output) * output.std())
            return output + nudges[-1]

        nudges: list[Tensor] = []
        before = self.output(visit, 0)
        hook = stage[0].module.register_forward_hook(nudge)
        moved = (self.output(visit, 0) - before).flatten(0, -2).float()  # whose norm half precision could not hold
        hook.remove()
        added = nudges[0].flatten(0, -2).float()
        # In half precision the sum is rounded; anything but a plain sum is further off than that.
        plain = added.shape == moved.shape and float((moved - added).norm() / added.norm()) < 0.02
        return stage[0] if ranks.from_main(lambda: plain) else None

    def _used_once(self, matrix: Matrix, visit: int) -> bool:
        whole = [m for m in self.model.matrices if m.name == matrix.name]
        return len(whole[0].uses) == 1 and self.visits.count(self.visits[visit]) == 1

    @torch.no_grad()
    def stages(self, visit: int, matrices: list[Matrix]) -> list[list[Matrix]]:
        """The matrices of a block in the order in which a forward pass reads their inputs.

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
            self.output(visit, 0)
        stage_of_kind = ranks.from_main(lambda: stage_of_kind)
        last = max(stage_of_kind.values(), default=0)
        stages: list[list[Matrix]] = [[] for _ in range(last + 1)]
        for matrix in matrices:
            stages[stage_of_kind.get(kinds[matrix.module, matrix.parameter], last)].append(matrix)
        return stages

    @torch.no_grad()
    def advance(self, visit: int) -> None:
        """Take every batch through the block as it stands."""
        for batch in range(len(self)):
            self.receive(visit, batch, self.leaves(visit, batch))

    @torch.no_grad()
    def outputs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield each batch's tokens (B, S) and last hidden state (B, S, d), once it made every visit."""
        for batch, tokens in enumerate(self.batches):
            _, last = self.route.calls(self.model, tokens, lambda leaf, batch=batch: self.given(leaf, batch))
            yield tokens, last


@torch.no_grad()
def _follow(model: LanguageModel, window: Tensor) -> Route:
    """The route of a window (1, S) through the model. Raises RunError where the blocks called one by one along it do
    not give what the model's own forward pass gives.
    """

    def refusal(why: str) -> RunError:
        what = f"--model {model.name}: {type(model.model).__name__} cannot be pruned block by block"
        return BlockwiseError(f"{what}: {why}; prune it with magnitude{', without --stream' if model.streamed else ''}")

    recorder = RouteRecorder(model)
    with _resident_in_forward(model), model.unchanged(), recorder:
        last = model.hidden_states(window)
    if recorder.reads_block_state:
        raise refusal("it reads what its blocks keep, which belongs to the window that they saw last")
    if missed := set(range(len(model.blocks))) - set(recorder.route.visits):
        raise refusal(f"its forward pass does not reach block {min(missed)}")
    route = recorder.end(last)
    order = [route.last_visit(block) for block in range(len(model.blocks))]
    if order != sorted(order):
        raise refusal("its forward pass ends with its blocks in another order than they stand in")
    if route.plain:
        calls, found = route.calls(model, window, lambda leaf: recorder.output if leaf == route.end else None)
        same = same_values([split(call)[1] for call in calls], recorder.calls)
    else:
        same, found = _go_along(model, window, route)
    if not (same and same_values(found, last)):
        raise refusal("its blocks called one after the other do not give what the whole model gives")
    return route


def _go_along(model: LanguageModel, window: Tensor, route: Route) -> tuple[bool, Tensor]:
    """Whether a pass that receives what each visit of a forward pass gives has its arguments, and what it ends in."""
    blockwise, same, visit = BlockwisePass(model, window, 1, route=route), True, -1
    containers: list = []

    def before(_module, args, kwargs):
        nonlocal same, visit
        visit += 1
        same &= same_values(blockwise.arguments(visit, 0), (args, kwargs))
        containers.append(Containers((args, kwargs)))

    def after(_module, _args, output):
        given = (output, containers.pop().written())
        given = tree_map_only(Tensor, torch.clone, given) if route.writes else given
        blockwise.receive(visit, 0, tree_flatten(given)[0])

    with _resident_in_forward(model), ExitStack() as stack:
        for block in model.blocks:
            stack.callback(block.register_forward_pre_hook(before, with_kwargs=True, prepend=True).remove)
            stack.callback(block.register_forward_hook(after).remove)
        model.hidden_states(window)
    return same, next(blockwise.outputs())[1]


@contextmanager
def _resident_in_forward(model: LanguageModel):
    """While forward passes of the whole model may reach every block."""
    with ExitStack() as stack:
        for index in range(len(model.blocks)):
            stack.enter_context(model.resident_in_forward(index))
        yield


def last_hidden_states(
    model: LanguageModel, windows: Tensor | Sequence[Tensor], batch_size: int = 1, store: Store | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches of windows (B, S) and their last hidden states (B, S, d), after the final norm.

    windows as `BlockwisePass` takes them.
    Of a model in memory batch by batch; of one that is not, all batches through one block, then through the next.
    """
    if not model.streamed:
        for batch in _batches(windows, batch_size):
            yield batch, model.hidden_states(batch)
        return
    blockwise = BlockwisePass(model, windows, batch_size, store)
    for visit, block in enumerate(progress(blockwise.visits, "evaluation", "block")):
        with model.resident_block(block):
            blockwise.advance(visit)
    yield from blockwise.outputs()


def _batches(windows: Tensor | Sequence[Tensor], batch_size: int) -> Sequence[Tensor]:
    return windows.split(batch_size) if isinstance(windows, Tensor) else windows


def _as_many_as_the_first(batches: Sequence[Tensor]) -> int:
    """How many of the first's size all batches come to at most, whether what is held of one grows with its tokens or
    with its windows.
    """
    windows, tokens = (sum(map(size, batches)) / size(batches[0]) for size in (len, Tensor.numel))
    return math.ceil(max(windows, tokens))


@contextmanager
def _watched(modules: list[nn.Module]) -> Iterator[dict[nn.Module, tuple[Tensor, Tensor]]]:
    """module -> the first argument and the output of its last call."""
    calls: dict[nn.Module, tuple[Tensor, Tensor]] = {}
    with ExitStack() as stack:
        for module in modules:
            hook = module.register_forward_hook(lambda m, args, output: calls.__setitem__(m, (args[0], output)))
            stack.callback(hook.remove)
        yield calls
