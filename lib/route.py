"""The way of a forward pass through a model's blocks, and what the model does between one block and the next.

A visit is one call of a block. What it gives is the block's output and what the block puts into dicts and lists that it
was called with; flattened, these are the visit's leaves, each known by (visit, place).
"""

import itertools
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map_only, tree_unflatten

from .blocks import StopForward, replaced_forward
from .calls import Call
from .errors import RunError
from .model import LanguageModel

Leaf = tuple[int, int]
SLOT = "the hidden state"  # stands where it goes in a call


@dataclass
class Route:
    """The visits of a forward pass, and of which leaves the arguments of each are made.

    visits      the block of each, in order
    specs       how the leaves of each make up what it gives
    leaves      of each: what is no tensor as it was in the pass that was followed, a tensor as one of its shape
    hidden      the place of each one's hidden state: its first tensor
    reads       the leaves that each one's arguments are made of, and last those of the model's last hidden state
    same_as     leaf -> the earlier one that was passed on as it came
    overwrites  whether each writes into the tensors that it is called with
    plain       whether each visit's hidden state is what the visit before gave, and nothing else is made of any leaf
    writes      whether the model itself writes into a leaf
    """

    visits: list[int] = field(default_factory=list)
    specs: list[TreeSpec] = field(default_factory=list)
    leaves: list[list] = field(default_factory=list)
    hidden: list[int] = field(default_factory=list)
    reads: list[frozenset[Leaf]] = field(default_factory=list)
    same_as: dict[Leaf, Leaf] = field(default_factory=dict)
    overwrites: list[bool] = field(default_factory=list)
    plain: bool = True
    writes: bool = False

    @property
    def end(self) -> Leaf:
        """The hidden state that the last visit gives."""
        return self.output_of(len(self.visits) - 1)

    def output_of(self, visit: int) -> Leaf:
        """The leaf that is the visit's hidden state."""
        leaf = visit, self.hidden[visit]
        return self.same_as.get(leaf, leaf)

    def last_visit(self, block: int) -> int:
        return len(self.visits) - 1 - self.visits[::-1].index(block)

    def last_read(self, leaf: Leaf) -> int:
        """The last visit that reads the leaf; the number of visits where the last hidden state does; -1 for none."""
        return max((visit for visit, leaves in enumerate(self.reads) if leaf in leaves), default=-1)

    def call(self, visit: int, block: nn.Module, call: Call) -> list:
        """The leaves of a visit with these arguments."""
        if self.overwrites[visit]:
            call = tree_map_only(Tensor, torch.clone, call)
        inside = Containers(call)
        output = block(*call[0], **call[1])
        return tree_flatten((output, inside.written()))[0]

    def calls(
        self, model: LanguageModel, tokens: Tensor, leaf: Callable[[Leaf], Tensor | None], end: int | None = None,
        run: Callable[[Tensor], Tensor] | None = None,
    ) -> tuple[list[Call], Tensor | None]:  # fmt: skip
        """The arguments of the visits, in order, of a forward pass that runs no block, and its last hidden state; or
        what `run(tokens)` gives in place of that.

        leaf((visit, place)) is given in place of a block's; where it is None, the hidden state goes through the block
        unchanged, and anything else is what nothing is made of. The pass ends at the visit `end`, if any, and gives no
        hidden state then. Raises RunError where these tokens take another route.
        """
        calls: list[Call] = []

        def stand_in(block: int, args: tuple, kwargs: dict):
            visit = len(calls)
            if visit >= len(self.visits) or self.visits[visit] != block:
                raise RunError(f"--model {model.name}: not all windows go through its blocks in the same order")
            calls.append((args, kwargs))
            if visit == end:
                raise StopForward
            leaves = list(self.leaves[visit])
            for place, default in enumerate(leaves):
                if isinstance(default, Tensor):
                    found = leaf(self.same_as.get((visit, place), (visit, place)))
                    if found is None:
                        found = split((args, kwargs))[0] if place == self.hidden[visit] else default
                    leaves[place] = found.clone() if self.writes else found
            output, written = tree_unflatten(leaves, self.specs[visit])
            Containers((args, kwargs)).write(written)
            return output

        last = None
        with _replaced_blocks(model, stand_in), suppress(StopForward):
            last = (run or model.hidden_states)(tokens)
        if end is None and len(calls) < len(self.visits):
            raise RunError(f"--model {model.name}: not all windows go through its blocks in the same order")
        return calls, last


def split(call: Call) -> tuple[Tensor, Call]:
    """A call's hidden state, its first tensor, and the call with a slot in its place."""
    args, kwargs = call
    for index, value in enumerate(args):
        if isinstance(value, Tensor):
            return value, ((*args[:index], SLOT, *args[index + 1 :]), kwargs)
    name = next(name for name, value in kwargs.items() if isinstance(value, Tensor))
    return kwargs[name], (args, kwargs | {name: SLOT})


def filled(call: Call, hidden: Tensor) -> Call:
    """The call with the hidden state in its slot."""
    args, kwargs = (
        tuple(hidden if value is SLOT else value for value in call[0]),
        {name: hidden if value is SLOT else value for name, value in call[1].items()},
    )
    return args, kwargs


class RouteRecorder(TorchDispatchMode):
    """While active, writes down the route of a forward pass.

    Every tensor that the model computes from a block's leaves outside the blocks carries their names.
    """

    _passes = itertools.count()

    def __init__(self, model: LanguageModel):
        super().__init__()
        self.route, self.calls = Route(), []  # calls: of each visit, without its hidden state
        self.output: Tensor | None = None
        self.reads_block_state = False  # whether the model reads what a block has kept somewhere in place of giving it
        self._model, self._pass = model, next(self._passes)
        self._inside: list[tuple] = []  # what a call that is under way was called with
        self._touched: set[Leaf] = set()
        self._hooks = ExitStack()

    def __enter__(self):
        for index, block in enumerate(self._model.blocks):
            before = lambda _m, args, kwargs, index=index: self._enter(index, (args, kwargs))  # noqa: E731
            # Outside of hooks that others set: these are part of the block.
            handle = block.register_forward_pre_hook(before, with_kwargs=True, prepend=True)
            self._hooks.callback(handle.remove)
            self._hooks.callback(block.register_forward_hook(self._leave).remove)
        return super().__enter__()

    def __exit__(self, *error):
        self._hooks.close()
        return super().__exit__(*error)

    def _made_of(self, tensor: Tensor) -> frozenset[Leaf]:
        number, leaves = getattr(tensor, "_made_of", (None, frozenset()))
        return leaves if number == self._pass else frozenset()

    def _is_block_state(self, tensor: Tensor) -> bool:
        return getattr(tensor, "_made_inside", None) == self._pass and not self._made_of(tensor)

    def _leaf(self, tensor: Tensor) -> Leaf | None:
        """The leaf that this tensor is, unless it was written to since."""
        number, leaf, version = getattr(tensor, "_leaf", (None, None, None))
        return leaf if number == self._pass and version == tensor._version else None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if self._inside:
            for tensor in tensors_in(result):
                tensor._made_inside = self._pass
            return result
        tensors = list(tensors_in((args, kwargs)))
        made_of = frozenset().union(*map(self._made_of, tensors))
        self.reads_block_state |= any(map(self._is_block_state, tensors))
        if made_of:
            self._touched |= made_of
            for tensor in tensors_in(result):
                tensor._made_of = self._pass, self._made_of(tensor) | made_of
        if func._schema.is_mutable:
            self.route.writes |= bool(self._made_of(args[0])) if isinstance(args[0], Tensor) else bool(made_of)
        return result

    def _enter(self, block: int, call: Call) -> None:
        route, (hidden, rest) = self.route, split(call)
        tensors = list(tensors_in(call))
        made_of = [self._made_of(value) for value in tensors_in(rest)]
        if route.visits:
            route.plain &= self._leaf(hidden) == route.end
        route.plain &= not any(made_of)
        self.reads_block_state |= any(map(self._is_block_state, tensors))
        route.visits.append(block)
        route.reads.append(frozenset(self._made_of(hidden)).union(*made_of))
        self.calls.append(rest)
        self._inside.append((tensors, [tensor._version for tensor in tensors], Containers(call)))

    def _leave(self, _block: nn.Module, _args: tuple, output) -> None:
        route, visit = self.route, len(self.route.visits) - 1
        tensors, versions, containers = self._inside.pop()
        written = containers.written()
        route.plain &= not written
        route.overwrites.append([tensor._version for tensor in tensors] != versions)
        leaves, spec = tree_flatten((output, written))
        places = [place for place, value in enumerate(leaves) if isinstance(value, Tensor)]
        route.specs.append(spec)
        route.hidden.append(places[0])
        self.output = leaves[places[0]]  # the last hidden state that a block gave
        for place in places:
            tensor, leaf = leaves[place], (visit, place)
            if known := self._leaf(tensor):
                route.same_as[leaf] = known
            else:
                tensor._made_of, tensor._leaf = (self._pass, frozenset([leaf])), (self._pass, leaf, tensor._version)
            leaves[place] = torch.zeros((), dtype=tensor.dtype, device=tensor.device).expand(tensor.shape)
        route.leaves.append(leaves)

    def end(self, last: Tensor) -> Route:
        """The route, once the pass has given its last hidden state."""
        route = self.route
        known = frozenset(leaf for leaves in route.reads for leaf in leaves)
        tails = {leaf for leaf in self._touched if leaf[1] != route.hidden[leaf[0]]}
        route.plain &= not (tails or route.writes)
        # What the model computed with for no visible end: stands in with its own shape all the same.
        route.reads.append(self._made_of(last) | (tails - known))
        route.plain &= self._made_of(last) <= {route.end}
        return route


class Containers:
    """The dicts and lists among a call's arguments, and what is put into them from now on."""

    def __init__(self, call: Call):
        self._held = [value for value in _parts((*call[0], *call[1].values())) if _is_container(value)]
        self._before = [dict(_items(value)) for value in self._held]

    def written(self) -> dict[int, dict]:
        """number of the container -> what it newly holds, by key or index."""
        found = {}
        for number, (held, before) in enumerate(zip(self._held, self._before, strict=True)):
            new = {key: value for key, value in _items(held) if key not in before or before[key] is not value}
            if new:
                found[number] = new
        return found

    def write(self, written: dict[int, dict]) -> None:
        """Put the same into the containers of another call."""
        for number, new in written.items():
            held = self._held[number]
            for key, value in new.items():
                if isinstance(held, list) and key == len(held):
                    held.append(value)
                else:
                    held[key] = value


def _is_container(value) -> bool:
    return isinstance(value, (MutableMapping, list))


def _items(container) -> Iterator[tuple]:
    return iter(container.items() if isinstance(container, MutableMapping) else enumerate(container))


def _parts(value) -> Iterator:
    """Everything in nested dicts, lists and tuples, these included."""
    yield value
    if isinstance(value, tuple) or _is_container(value):
        for _, part in _items(value):
            yield from _parts(part)


def tensors_in(value) -> Iterator[Tensor]:
    return (part for part in _parts(value) if isinstance(part, Tensor))


@contextmanager
def _replaced_blocks(model: LanguageModel, forward: Callable[[int, tuple, dict], object]):
    """While `forward(block, args, kwargs)` stands in for every block, hooks included."""
    with ExitStack() as stack:
        for index, block in enumerate(model.blocks):
            stand_in = lambda *args, index=index, **kwargs: forward(index, args, kwargs)  # noqa: E731
            stack.enter_context(replaced_forward(block, stand_in))
            stack.enter_context(_without_hooks(block))
        yield


@contextmanager
def _without_hooks(module: nn.Module):
    kinds = ("_forward_hooks", "_forward_pre_hooks")
    held = {kind: getattr(module, kind) for kind in kinds}
    for kind in kinds:
        setattr(module, kind, type(held[kind])())
    try:
        yield
    finally:
        for kind in kinds:
            setattr(module, kind, held[kind])
