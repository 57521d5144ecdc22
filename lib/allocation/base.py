"""What an allocation is, what it may look at, and the one entry that runs it."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from ..errors import RunError
from ..options import Option
from ..registry import Registry
from ..stats import InputStats
from .budget import S_MAX, UnreachableError, exact_multiples, round_to_pattern

log = logging.getLogger(__name__)

MAPPINGS = ("block_wise", "layer_wise", "mixed")


@dataclass(frozen=True)
class Problem:
    """Everything an allocation may look at; all mappings share the matrices' names as keys.

    sizes         weights in each matrix
    blocks        the block each matrix belongs to
    sparsity      the share of all weights to prune, S; None where the allocation is told each matrix's, and S is not
    scores        of each matrix: layer quality, larger for matrices that can lose more, or what the allocation's own
                  `score` says of it; empty where it reads none
    mapping       one of MAPPINGS: where the sparsities may differ
    block_scores  of each block as a whole; where empty, the mean over its matrices
    shapes        (out, in) of each matrix (`er`)
    options       the allocations' parameters by their flags' names; of a file, what was read of it
    """

    sizes: Mapping[str, int]
    blocks: Mapping[str, int]
    sparsity: float | None
    scores: Mapping[str, float]
    mapping: str = "block_wise"
    block_scores: Mapping[int, float] = field(default_factory=dict)
    shapes: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    options: Mapping[str, float] = field(default_factory=dict)

    def members(self) -> dict[int, list[str]]:
        """The names of each block's matrices."""
        members: dict[int, list[str]] = {}
        for name, block in self.blocks.items():
            members.setdefault(block, []).append(name)
        return members

    def mean(self, sparsities: Mapping[str, float]) -> float:
        """The share of all weights that sparsities of the matrices come to."""
        return math.fsum(sparsities[name] * size for name, size in self.sizes.items()) / sum(self.sizes.values())

    def score_of_block(self, block: int, names: Sequence[str]) -> float:
        if self.block_scores:
            return self.block_scores[block]
        return sum(self.scores[name] for name in names) / len(names)


# Weights and input statistics of the matrices that are scored together, and the options, to their score.
Score = Callable[[Sequence[tuple[Tensor, InputStats | None]], Mapping[str, float]], object]


@dataclass(frozen=True)
class Allocation:
    """solve(problem) -> sparsity of each matrix.

    needs_scores  whether it reads the scores of --WW_metric
    score         or a score of its own, of the dense model's weights and inputs
    needs         what of the inputs that score reads (lib/stats.py)
    options       its parameters, which are flags: 0 of the first is uniform, and `auto` chooses at most one of them
    uses_trials   whether its scores come from pruning the model on trial (lib/trials.py)
    reads_mapping whether --mapping_type matters
    given         whether the user says each sparsity: none is rounded, and their mean is what it is
    """

    solve: Callable[[Problem], dict[str, float]]
    needs_scores: bool = False
    score: Score | None = None
    needs: str = "nothing"
    options: tuple[Option, ...] = ()
    uses_trials: bool = False
    reads_mapping: bool = False
    given: bool = False

    def __post_init__(self):
        if sum(bool(option.auto) for option in self.options) > 1:
            raise ValueError("`auto` can choose one parameter of an allocation, not several")

    @property
    def reads_model(self) -> bool:
        """Whether it reads more than the matrices' names and shapes."""
        return self.needs_scores or self.score is not None or self.uses_trials


ALLOCATIONS: Registry[Allocation] = Registry("--prune_method")


def allocation(name: str, **properties):
    """Register a function of a `Problem` as the allocation `name`; `properties` are those of `Allocation`."""
    return ALLOCATIONS.register(name, lambda function: Allocation(function, **properties))


def by_mapping(
    problem: Problem, sparsities_of: Callable[[Mapping[str, float], float], dict[str, float]]
) -> dict[str, float]:
    """`sparsities_of(scores, mean sparsity)`, which meet that mean, at the problem's granularity.

    block_wise  of the blocks' scores
    layer_wise  of the matrices' own
    mixed       the block-wise sparsity is each block's budget, spread inside by the matrices' own scores
    """

    def solve(scores: Mapping[str, float], sparsity: float) -> dict[str, float]:
        if min(scores.values()) == max(scores.values()):
            return dict.fromkeys(scores, sparsity)
        return sparsities_of(scores, sparsity)

    if problem.mapping == "layer_wise":
        return solve(problem.scores, problem.sparsity)
    members = problem.members()
    of_block = {block: problem.score_of_block(block, names) for block, names in members.items()}
    by_block = solve({name: of_block[block] for name, block in problem.blocks.items()}, problem.sparsity)
    if problem.mapping == "block_wise":
        return by_block
    result = {}
    for names in members.values():
        result |= solve({name: problem.scores[name] for name in names}, by_block[names[0]])
    return result


def allocate(
    method: str, problem: Problem, group: int | None = None, *, events: list[dict] | None = None
) -> dict[str, float]:
    """Sparsity of each matrix under the allocation `method`, its parameter-weighted mean equal to S.

    With `group`, the M of N:M, every sparsity is a multiple of 1/M and the mean as close as that allows.
    Matrices held at a bound, and sparsities that `group` makes the same, are noted in `events`. Raises RunError where
    S cannot be reached within the bounds.
    """
    entry = ALLOCATIONS[method]
    try:
        solution = entry.solve(problem)
    except UnreachableError as error:
        parameter = next((option.name for option in entry.options if not option.read), None)
        evener = f", or for --{parameter} closer to 0" if parameter else ""
        raise RunError(f"--sparsity_ratio {problem.sparsity:g}: {error}; ask for less{evener}") from error
    clamped = [name for name, sparsity in solution.items() if sparsity == S_MAX]
    if clamped and events is not None:
        events.append({"matrix": None, "message": f"held at the largest sparsity {S_MAX}: {', '.join(clamped)}"})
    if entry.given and group is not None:
        return exact_multiples(solution, group)
    if group is None:
        return solution
    units = list(problem.members().values()) if problem.mapping == "block_wise" else [[name] for name in problem.sizes]
    rounded = round_to_pattern(solution, problem.sizes, units, problem.sparsity, group)
    if events is not None and len(set(rounded.values())) == 1 < len(set(solution.values())):
        message = f"all sparsities are the same in whole zeros of {group} weights: {method} changes nothing"
        log.warning("%s", message)
        events.append({"matrix": None, "message": message})
    return rounded
