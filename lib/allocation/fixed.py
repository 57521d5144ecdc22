"""Allocations that need neither activations nor a metric: by depth, by shape, by magnitude."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..options import Option, multiples
from ..stats import InputStats
from .base import Problem, allocation
from .budget import S_MAX, fit_budget

QUANTILES = 1000  # of a matrix's scores, in place of all of them

BETA = Option(
    "ramp_beta", 0.01, "parameter of *_ramp: what the sparsity grows by from block to block, in [-1, 1]; 0.01 is this "
    "project's choice; or auto", within=(-1, 1), auto=multiples(0.01),
)  # fmt: skip


@allocation("ramp", options=(BETA,))
def ramp(problem: Problem) -> dict[str, float]:
    """s_b = S - beta (B - 1) / 2 + beta b, by depth only (ATP, arXiv 2502.14770): what any other has to beat."""
    beta, last = problem.options["ramp_beta"], max(problem.blocks.values())
    ratios = {name: max(0.0, problem.sparsity + beta * (block - last / 2)) for name, block in problem.blocks.items()}
    return fit_budget(ratios, problem.sizes, problem.sparsity)


def _fit_density(density: Mapping[str, float], problem: Problem) -> dict[str, float]:
    """Sparsities whose densities are in proportion to `density`, none denser than full."""
    kept = fit_budget(density, problem.sizes, 1 - problem.sparsity, s_min=1 - S_MAX, s_max=1.0)
    return {name: 1 - share for name, share in kept.items()}


@allocation("er")
def er(problem: Problem) -> dict[str, float]:
    """Erdos-Renyi: the density of a matrix is proportional to (out + in) / (out * in) (Mocanu et al. 2018)."""
    return _fit_density({name: (out + into) / (out * into) for name, (out, into) in problem.shapes.items()}, problem)


def lamp_quantiles(
    matrices: Sequence[tuple[Tensor, InputStats | None]], _options: Mapping[str, float]
) -> list[list[float]]:
    """Of each matrix: log LAMP score, w^2 / sum of the w'^2 not smaller, at QUANTILES + 1 even shares of the sorted
    weights; (matrices, QUANTILES + 1), ascending."""
    tables = []
    for weight, _ in matrices:
        squares = weight.double().square().flatten().sort().values
        scores = squares / squares.flip(0).cumsum(0).flip(0).clamp(min=torch.finfo(torch.float64).tiny)
        at = torch.linspace(0, len(scores) - 1, QUANTILES + 1, device=scores.device).round().long()
        tables.append(scores[at].clamp(min=torch.finfo(torch.float64).tiny).log().tolist())
    return tables


@allocation("lamp", score=lamp_quantiles)
def lamp(problem: Problem) -> dict[str, float]:
    """Layer-adaptive magnitude (Lee et al. 2021, arXiv 2010.07611): one threshold on all matrices' LAMP scores.

    The threshold is found by bisection, to the resolution of the quantiles, and the budget then met exactly.
    """
    tables = {name: torch.tensor(scores[0], dtype=torch.float64) for name, scores in problem.scores.items()}
    total = sum(problem.sizes.values())

    def below(threshold: float) -> dict[str, float]:
        return {
            name: min(S_MAX, int(torch.searchsorted(table, threshold)) / QUANTILES) for name, table in tables.items()
        }

    low = min(float(table[0]) for table in tables.values())
    high = max(float(table[-1]) for table in tables.values())
    for _ in range(60):
        middle = (low + high) / 2
        pruned = sum(share * problem.sizes[name] for name, share in below(middle).items())
        low, high = (middle, high) if pruned < problem.sparsity * total else (low, middle)
    return _fit_density({name: 1 - share for name, share in below(high).items()}, problem)
