"""Allocation by measurement: what the loss on windows held out says each matrix's weights are worth."""

import math
import re
import statistics
from collections.abc import Mapping

from .base import Problem, allocation
from .budget import S_MAX, S_MIN

LEAST = 0.2  # of the median: what a block's or kind's worth is taken to be at least
ROUNDS = 50


@allocation("search", measured=True, options=("search_strength",), granular=True)
def search(problem: Problem) -> dict[str, float]:
    """Equal marginal losses: s_k = S - strength / kappa * log(m_k) + c, clipped, c such that the budget is met.

    A matrix's score is the loss it accounts for when all matrices' sparsities rise a little around S, and kappa, with
    which the marginal loss grows: as exp(kappa s) (lib/trials.py). m_k is what one removed weight costs, u_block *
    v_kind, the factors fitted so that they reproduce the sums over blocks and over kinds: single matrices' parts are
    mostly noise. `block_wise` knows u only, `layer_wise` both; `mixed` keeps the block-wise sparsities and spreads them
    inside by v.
    """
    worth_of_block, worth_of_kind = _factors(problem, by_kind=problem.mapping != "block_wise")
    _, kappa = next(iter(problem.scores.values()))
    slope = problem.options["search_strength"] / kappa
    of_block = {name: -slope * math.log(worth_of_block[block]) for name, block in problem.blocks.items()}
    of_kind = {name: -slope * math.log(worth_of_kind[_kind(name)]) for name in problem.blocks}
    if problem.mapping != "mixed":
        return _shift({name: of_block[name] + of_kind[name] for name in problem.sizes}, problem, problem.sparsity)
    worth_of_block, _ = _factors(problem, by_kind=False)
    by_block = _shift(
        {name: -slope * math.log(worth_of_block[block]) for name, block in problem.blocks.items()},
        problem, problem.sparsity,
    )  # fmt: skip
    result = {}
    for names in problem.members().values():
        result |= _shift({name: of_kind[name] for name in names}, problem, by_block[names[0]])
    return result


def _kind(name: str) -> str:
    return re.sub(r"\d+", "*", name)


def _factors(problem: Problem, by_kind: bool) -> tuple[dict[int, float], dict[str, float]]:
    """u and v of m = u_block * v_kind that reproduce the parts' sums by block and by kind (1 for every kind unless
    `by_kind`)."""
    part = {name: score[0] for name, score in problem.scores.items()}
    kinds = {name: _kind(name) for name in part}
    u, v = dict.fromkeys(problem.members(), 1.0), dict.fromkeys(kinds.values(), 1.0)
    for _ in range(ROUNDS):
        u = _ratio(part, {name: problem.sizes[name] * v[kind] for name, kind in kinds.items()}, problem.blocks)
        if not by_kind:
            break
        v = _ratio(part, {name: problem.sizes[name] * u[block] for name, block in problem.blocks.items()}, kinds)
    return u, v


def _ratio(parts: Mapping[str, float], weights: Mapping[str, float], group: Mapping[str, object]) -> dict:
    """Sum of parts over sum of weights in each group, not below LEAST of the median."""
    groups: dict[object, list[str]] = {}
    for name, key in group.items():
        groups.setdefault(key, []).append(name)
    found = {key: sum(parts[n] for n in names) / sum(weights[n] for n in names) for key, names in groups.items()}
    least = LEAST * max(statistics.median(found.values()), 1e-12)
    return {key: max(value, least) for key, value in found.items()}


def _shift(raw: Mapping[str, float], problem: Problem, sparsity: float) -> dict[str, float]:
    """clip(raw_k + c, S_MIN, S_MAX) with the one c at which the parameter-weighted mean is `sparsity`, by bisection."""
    total = sum(problem.sizes[name] for name in raw)

    def at(shift: float) -> dict[str, float]:
        return {name: min(S_MAX, max(S_MIN, value + shift)) for name, value in raw.items()}

    low, high = -max(raw.values()), S_MAX - min(raw.values())
    for _ in range(100):
        middle = (low + high) / 2
        pruned = sum(share * problem.sizes[name] for name, share in at(middle).items())
        low, high = (middle, high) if pruned < sparsity * total else (low, middle)
    return at(high)
