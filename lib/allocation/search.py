"""Allocation by sensitivity: what pruning each matrix costs, measured on held-out windows."""

import math
import re
import statistics
from collections.abc import Mapping
from dataclasses import replace

from ..options import Option, multiples
from .base import Problem, allocation, by_mapping
from .budget import shift_to_budget

KAPPA = 6.0  # with which the marginal loss grows, as exp(KAPPA s); measured 4 to 10, the more the worse the model
MIN_SENSITIVITY = 0.2  # of the median: the least sensitivity of a block or kind
ROUNDS = 50

STRENGTH = Option(
    "search_strength", 0.6, "parameter of *_search: how far it follows its measurements, in [0, 2]: 0 is uniform, 1 "
    "equal marginal losses; or auto", within=(0, 2), auto=multiples(0.6),
)  # fmt: skip


@allocation("search", uses_trials=True, options=(STRENGTH,), reads_mapping=True)
def search(problem: Problem) -> dict[str, float]:
    """Equal marginal losses: s_k = S + strength / KAPPA * (mean(log m) - log m_k), and then exactly to the budget.

    A matrix's score is the loss it accounts for when all matrices' sparsities rise a little, up to S (lib/trials.py).
    m_k is what one removed weight costs, u_block * v_kind, the factors fitted so that they reproduce the sums over
    blocks and over kinds: single matrices' parts are mostly noise. `block_wise` knows the blocks' sums only,
    `layer_wise` both; `mixed` spreads the block-wise sparsities by kind.
    """
    slope = problem.options["search_strength"] / KAPPA
    of_block = _per_weight(problem.scores, problem.sizes, problem.blocks)
    by_sensitivity = replace(
        problem,
        scores={name: slope * math.log(sensitivity) for name, sensitivity in _sensitivities(problem).items()},
        block_scores={block: slope * math.log(sensitivity) for block, sensitivity in of_block.items()},
    )
    return by_mapping(by_sensitivity, lambda scores, sparsity: shift_to_budget(sparsity, scores, problem.sizes))


def _kind(name: str) -> str:
    return re.sub(r"\d+", "*", name)


def _sensitivities(problem: Problem) -> dict[str, float]:
    """u_block * v_kind of every matrix, such that the sums over blocks and over kinds are those of the parts."""
    kinds = {name: _kind(name) for name in problem.scores}
    u, v = {}, dict.fromkeys(kinds.values(), 1.0)
    for _ in range(ROUNDS):
        u = _per_weight(problem.scores, {n: problem.sizes[n] * v[kind] for n, kind in kinds.items()}, problem.blocks)
        v = _per_weight(problem.scores, {n: problem.sizes[n] * u[b] for n, b in problem.blocks.items()}, kinds)
    return {name: u[b] * v[kinds[name]] for name, b in problem.blocks.items()}


def _per_weight(parts: Mapping[str, float], weights: Mapping[str, float], group: Mapping[str, object]) -> dict:
    """Sum of parts over sum of weights in each group, not below MIN_SENSITIVITY of the median."""
    groups: dict[object, list[str]] = {}
    for name, key in group.items():
        groups.setdefault(key, []).append(name)
    found = {key: sum(parts[n] for n in names) / sum(weights[n] for n in names) for key, names in groups.items()}
    least = MIN_SENSITIVITY * max(statistics.median(found.values()), 1e-12)
    return {key: max(value, least) for key, value in found.items()}
