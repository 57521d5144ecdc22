"""The mixtures inside a block: which parameters hold several matrices, and which matrices choose among experts.

Both are told by structure. A stack holds a matrix for every expert along its first axis, which is known by its length:
the module says so (an attribute such as `num_experts`), or a router beside it has so many outputs. A router is what has
as many outputs as there are experts and lies beside them, not among them.
"""

import re
from dataclasses import dataclass

import transformers
from torch import nn

Parameters = list[tuple[str, nn.Parameter]]


@dataclass(frozen=True)
class Stack:
    """A parameter of a module that holds `count` matrices: (count, out, in), or (count, in, out) where `transposed`;
    of two dimensions where the first two are merged.
    """

    parameter: str
    count: int
    transposed: bool


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, transformers.pytorch_utils.Conv1D))


def never_prunable(module: nn.Module) -> bool:
    """Embeddings, norms and convolutions."""
    convolution = isinstance(module, nn.modules.conv._ConvNd)
    return convolution or isinstance(module, nn.Embedding) or "norm" in type(module).__name__.lower()


def matrix_parameters(module: nn.Module) -> Parameters:
    """The module's own parameters of two or more dimensions (lengths of one do not count), without biases."""
    return [
        (name, parameter)
        for name, parameter in module.named_parameters(recurse=False)
        if sum(length > 1 for length in parameter.shape) > 1 and "bias" not in name
    ]


class Mixtures:
    """The mixtures of one block.

    stacks   module -> its parameters that hold several matrices
    routers  parameters that choose among experts or weigh them
    """

    def __init__(self, block: nn.Module):
        self._block = block
        self._parents = {child: module for module in block.modules() for child in module.children()}
        self.stacks: dict[nn.Module, list[Stack]] = {}
        self.routers: set[nn.Parameter] = set()
        experts: dict[nn.Module, int] = {}  # what holds experts -> how many
        for module in block.modules():
            if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
                held = list(module.values() if isinstance(module, nn.ModuleDict) else module)
                if len(held) > 1 and all(any(map(is_linear, one.modules())) for one in held):
                    experts[module] = len(held)
            elif stacks := self._stacks_of(module):
                self.stacks[module] = stacks
                if not is_linear(module):
                    experts[module] = max(stack.count for stack in stacks)
            for alike in _numbered(module):
                holder = nn.ModuleList(alike)  # as if they were a list
                experts[holder], self._parents[holder] = len(alike), module
        for holder in experts:
            self.routers |= self._routers_of(holder, experts)
        if self.routers:
            inside = {module for holder in experts for module in holder.modules()}
            outside = [m for m in block.modules() if is_linear(m) and m not in inside]
            self.routers |= {m.weight for m in outside if _in_out(m)[1] == 1}  # gates of shared experts

    def _stacks_of(self, module: nn.Module) -> list[Stack]:
        if is_linear(module):
            counts = _counts(module, "group")
            if type(module).forward in (nn.Linear.forward, transformers.pytorch_utils.Conv1D.forward) or not counts:
                return []
            return [Stack("weight", count, False) for count in counts[:1] if len(module.weight) % count == 0]
        if never_prunable(module) or not (own := matrix_parameters(module)):
            return []
        counts = _counts(module, "expert")
        deep = [(name, p) for name, p in own if p.dim() == 3 and len(p) > 1 and min(p.shape[1:]) > 1]
        if deep:
            known = hasattr(module, "is_transposed") or all(len(p) in counts for _, p in deep)
            if not known and not all(self._routers_of(module, {module: len(p)}, own=False) for _, p in deep):
                return []
            if hasattr(module, "is_transposed"):
                turned = [module.is_transposed] * len(deep)
            else:
                routers = self._routers_of(module, {module: len(deep[0][1])})
                turned = _transposed([tuple(p.shape[1:]) for _, p in deep], routers)
            return [Stack(name, len(p), turn) for (name, p), turn in zip(deep, turned, strict=True)]
        for count in counts:
            flat = [(name, p) for name, p in own if len(p) % count == 0 and len(p) > count]
            if len(flat) == len(own) and (routers := self._routers_of(module, {module: count})):
                turned = _transposed([(len(p) // count, p.shape[1]) for _, p in flat], routers)
                return [Stack(name, count, turn) for (name, _), turn in zip(flat, turned, strict=True)]
        return []

    def _routers_of(self, holder: nn.Module, experts: dict[nn.Module, int], own: bool = True) -> set[nn.Parameter]:
        """What chooses among the experts in `holder`: a parameter or a module, as near to them as there is one, that
        ends in as many outputs as there are experts (one more for none of them, or those of several kinds together).
        Other parameters of `holder` itself count only with `own`.
        """
        beside = holder if not isinstance(holder, (nn.ModuleList, nn.ModuleDict)) else self._parents.get(holder)
        while beside is not None:
            around = set(beside.modules())
            held = {m: count for m, count in experts.items() if m in around or not around.isdisjoint(m.children())}
            lists = [module for module in held if isinstance(module, (nn.ModuleList, nn.ModuleDict))]
            inside = {*held, *(each for module in lists for each in module.children())}
            outputs = {n for count in held.values() for n in (count, count + 1)} | {sum(held.values())}
            found: set[nn.Parameter] = set()
            if not is_linear(beside) and (own or beside is not holder):
                stacked = {stack.parameter for stack in self.stacks.get(beside, ())}
                single = [p for name, p in matrix_parameters(beside) if name not in stacked and p.dim() == 2]
                found |= {p for p in single if {*p.shape} & outputs and p.shape[0] != p.shape[1]}
            for child in beside.children():
                modules = list(child.modules())
                if not inside & set(modules):
                    matrices = [(m, p) for m in modules if not never_prunable(m) for _, p in matrix_parameters(m)]
                    if not matrices or any(p.dim() != 2 for _, p in matrices):
                        continue
                    (first, p), (last, q) = matrices[0], matrices[-1]
                    read = _in_out(first)[0] if is_linear(first) else max(p.shape)
                    given = {_in_out(last)[1]} if is_linear(last) else {*q.shape}
                    if given & outputs - {read}:  # what gives as many as it reads may be any matrix
                        found |= {p for _, p in matrices}
            if found:
                return found
            beside = None if beside is self._block else self._parents[beside]
        return set()


def _numbered(module: nn.Module) -> list[list[nn.Module]]:
    """The children that are alike, in their names but for a number and in the shapes of their parameters, and hold
    linear maps: experts that are in no list.
    """
    if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        return []
    alike: dict[tuple, list[nn.Module]] = {}
    for name, child in module.named_children():
        bare = re.sub(r"\d+", "*", name)
        if bare != name and not is_linear(child) and any(map(is_linear, child.modules())):
            shapes = tuple((key, parameter.shape) for key, parameter in child.named_parameters())
            alike.setdefault((bare, shapes), []).append(child)
    return [found for found in alike.values() if len(found) > 1]


def _counts(module: nn.Module, what: str) -> list[int]:
    """The numbers that the module knows by a name with `what` in it, largest first."""
    return sorted({v for k, v in vars(module).items() if what in k and type(v) is int and v > 1}, reverse=True)


def _transposed(shapes: list[tuple[int, int]], routers: set[nn.Parameter]) -> list[bool]:
    """For the matrices of one expert, as stored and in order, whether each is (in, out) rather than (out, in).

    What the first reads is what one of the others writes and what the routers read, and what that one reads is what the
    first writes, or half of it where that is a gate and what it opens; the rest read and write what the first does.
    """
    width = {length for router in routers for length in router.shape}
    for turned in ([False] * len(shapes), [True] * len(shapes), [False] * (len(shapes) - 1) + [True]):
        (first_out, first_in), *others = [s[::-1] if turn else s for s, turn in zip(shapes, turned, strict=True)]
        writers = [(out, read) for out, read in others if out == first_in and first_out in (read, 2 * read)]
        readers = [(out, read) for out, read in others if read == first_in and out == first_out]
        chained = not others or (writers and len(others) <= len(readers) + len(writers))
        if chained and (not others or not width or first_in in width):
            return turned
    return [False] * len(shapes)


def _in_out(linear: nn.Module) -> tuple[int, int]:
    """How many numbers a linear map reads and how many it gives."""
    shape = tuple(linear.weight.shape)
    return shape[::-1] if isinstance(linear, nn.Linear) else shape
