"""What an allocation is, and the one entry that runs it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..registry import Registry
from .budget import S_MAX, round_to_pattern

MAPPINGS = ("block_wise", "layer_wise", "mixed")


@dataclass(frozen=True)
class Problem:
    """Everything an allocation may look at; all mappings share the matrices' names as keys.

    sizes     weights in each matrix
    blocks    the block each matrix belongs to
    sparsity  the share of all weights to prune, S
    scores    layer quality, larger for matrices that can lose more; empty where the method needs none
    epsilon   half the range of the pruning ratios around 1
    mapping   one of MAPPINGS: where the sparsities may differ
    """

    sizes: Mapping[str, int]
    blocks: Mapping[str, int]
    sparsity: float
    scores: Mapping[str, float]
    epsilon: float = 0.2
    mapping: str = "block_wise"

    def members(self) -> dict[int, list[str]]:
        """The names of each block's matrices."""
        members: dict[int, list[str]] = {}
        for name, block in self.blocks.items():
            members.setdefault(block, []).append(name)
        return members


@dataclass(frozen=True)
class Allocation:
    """solve(problem) -> sparsity of each matrix; needs_scores where it reads `problem.scores`."""

    solve: Callable[[Problem], dict[str, float]]
    needs_scores: bool


ALLOCATIONS: Registry[Allocation] = Registry("--prune_method")


def allocation(name: str, *, needs_scores: bool):
    """Register a function of a `Problem` as the allocation `name`."""
    return ALLOCATIONS.register(name, lambda function: Allocation(function, needs_scores))


def allocate(
    method: str, problem: Problem, group: int | None = None, *, events: list[dict] | None = None
) -> dict[str, float]:
    """Sparsity of each matrix under the allocation `method`, its parameter-weighted mean equal to S.

    With `group`, the M of N:M, every sparsity is a multiple of 1/M and the mean as close as that allows.
    Matrices held at a bound are noted in `events`. Raises RunError where S cannot be reached within the bounds.
    """
    solution = ALLOCATIONS[method].solve(problem)
    clamped = [name for name, sparsity in solution.items() if sparsity == S_MAX]
    if clamped and events is not None:
        events.append({"matrix": None, "message": f"held at the largest sparsity {S_MAX}: {', '.join(clamped)}"})
    if group is None:
        return solution
    units = list(problem.members().values()) if problem.mapping == "block_wise" else [[name] for name in problem.sizes]
    return round_to_pattern(solution, problem.sizes, units, problem.sparsity, group)
