"""Allocations that look at weights and activations: OWL, DLP and LSA.

Each scores the dense model (of a block all its matrices together), and keeps more where the score says so:
s = S + mean(keep) - keep, in the manner of OWL, and then exactly to the budget.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ..options import Option, multiples
from ..stats import InputStats, wanda_scores
from .base import Problem, allocation, by_mapping
from .budget import shift_to_budget

LSA_GROUP = 128  # columns pruned together
LSA_GROUPS_ON_GPU = 4


def _span(name: str, method: str, default: float) -> Option:
    """The parameter that the three have in common."""
    text = f"parameter of *_{method}: half the range of sparsities, in [0, 1]; or auto"
    return Option(name, default, text, within=(0, 1), auto=multiples(default))


OWL_LAMBDA = _span("owl_lambda", "owl", 0.08)
OWL_M = Option("owl_m", 5.0, "parameter of *_owl: an outlier is so many times the mean", above=0)
DLP_ALPHA = _span("dlp_alpha", "dlp", 0.15)
LSA_ALPHA = _span("lsa_alpha", "lsa", 0.15)


def _keep_more(problem: Problem, scores: Mapping[str, float], sparsity: float, span: float) -> dict[str, float]:
    """S + mean(keep) - keep with keep in [0, 2 span], growing with the score."""
    low, high = min(scores.values()), max(scores.values())
    keep = {name: 2 * span * (score - low) / (high - low) for name, score in scores.items()}
    return shift_to_budget(sparsity, keep, problem.sizes)


def _importance(scores: Mapping[str, float]) -> dict[str, float]:
    """1 - score / sum(scores): DLP's relative importance, which is large where the score is small."""
    total = sum(scores.values())
    return {name: 1 - score / total for name, score in scores.items()}


def outliers(matrices: Sequence[tuple[Tensor, InputStats | None]], options: Mapping[str, float]) -> float:
    """Percentage of the entries of |W| * ||X||_2 above `owl_m` times their mean."""
    scores = torch.cat([wanda_scores(*matrix).flatten() for matrix in matrices])
    return 100 * float((scores > options["owl_m"] * scores.mean()).float().mean())


@allocation("owl", score=outliers, needs="diagonal", options=(OWL_LAMBDA, OWL_M), reads_mapping=True)
def owl(problem: Problem) -> dict[str, float]:
    """Outlier-weighed layer-wise sparsity (Yin et al. 2023, arXiv 2310.05175): more outliers keep more weights."""
    span = problem.options["owl_lambda"]
    return by_mapping(problem, lambda scores, sparsity: _keep_more(problem, scores, sparsity, span))


def median_score(matrices: Sequence[tuple[Tensor, InputStats | None]], _options: Mapping[str, float]) -> float:
    """Median of the entries of |W| * ||X||_2, as in the paper (the published code takes the mean)."""
    return float(torch.cat([wanda_scores(*matrix).flatten() for matrix in matrices]).median())


@allocation("dlp", score=median_score, needs="diagonal", options=(DLP_ALPHA,), reads_mapping=True)
def dlp(problem: Problem) -> dict[str, float]:
    """Dynamic layer-wise pruning (Chen et al. 2025, arXiv 2505.23807): a low median keeps more weights."""
    span = problem.options["dlp_alpha"]
    return by_mapping(problem, lambda scores, sparsity: _keep_more(problem, _importance(scores), sparsity, span))


def linear_reconstruction_error(weight: Tensor, gram: Tensor) -> float:
    """Error of removing, greedily, half of the weights of each row in each group of LSA_GROUP columns.

    weight (out, in), gram X^T X (in, in). Taking w_i besides the weights S already gone adds
    w_i^2 G_ii + 2 w_i sum_{j in S} w_j G_ij to the row's squared error; the least is taken next. Groups do not see
    each other: on a GPU, whose time goes into launches, a few are done at once.
    """
    total = torch.zeros((), dtype=torch.float64, device=weight.device)
    at_once = LSA_GROUPS_ON_GPU * LSA_GROUP if weight.is_cuda else LSA_GROUP
    whole = weight.shape[1] // LSA_GROUP * LSA_GROUP  # the last group may be narrower
    bounds = [*range(0, whole, at_once), whole, weight.shape[1]]
    for begin, end in pairwise(bounds):
        width = min(LSA_GROUP, end - begin)
        if width < 2:
            continue
        w = weight[:, begin:end].float().unflatten(1, (-1, width))  # (out, groups, g)
        within = [gram[i : i + width, i : i + width] for i in range(begin, end, width)]
        g = torch.stack(within).to(w.device)  # (groups, g, g)
        cost = w.square() * g.diagonal(dim1=1, dim2=2)
        first = width * torch.arange(len(g), device=w.device)  # row of each group in all of their rows
        g = g.flatten(0, 1)
        for _ in range(width // 2):
            least = cost.min(2)
            total += least.values.double().sum()
            taken = least.indices[..., None]  # (out, groups, 1)
            cost += 2 * w * (w.gather(2, taken) * g[first + least.indices])
            cost.scatter_(2, taken, torch.inf)
    return float(total)


def mean_reconstruction_error(
    matrices: Sequence[tuple[Tensor, InputStats | None]], _options: Mapping[str, float]
) -> float:
    """The mean over the matrices; one whose input saw no token costs nothing."""
    errors = [0.0 if stats is None else linear_reconstruction_error(weight, stats.gram) for weight, stats in matrices]
    return sum(errors) / len(errors)


@allocation("lsa", score=mean_reconstruction_error, needs="gram", options=(LSA_ALPHA,), reads_mapping=True)
def lsa(problem: Problem) -> dict[str, float]:
    """Layer-wise sparsity allocation (ICLR 2026, OpenReview xq3lza5IjN): by reconstruction errors, then as DLP."""
    span = problem.options["lsa_alpha"]
    return by_mapping(problem, lambda scores, sparsity: _keep_more(problem, _importance(scores), sparsity, span))
