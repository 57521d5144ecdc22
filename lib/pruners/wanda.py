"""Wanda: pruning by weights and activations (Sun et al. 2023, arXiv 2306.11695)."""

import torch
from torch import Tensor

from ..errors import RunError
from ..masks import Pattern, lowest_of_matrix, lowest_of_rows
from ..stats import InputStats, wanda_scores
from .base import Pruner, mask_of, pruner


def wanda_variant(weight: Tensor, stats: InputStats, sparsity: float, pattern: Pattern) -> Tensor:
    """Remove from each row the smallest weights whose cumulative score is at most a share a of the row's.

    One a for the matrix, such that it meets its own sparsity: the published bisection for a converges to
    the k-th smallest of all cumulative shares, which is selected here directly. Weights that are zero already go first.
    """
    if pattern.group is not None:
        raise RunError("--use_variant: is defined for --sparsity_type unstructured only")
    scores = wanda_scores(weight, stats)
    if pattern.zeroed is not None:
        scores.masked_fill_(pattern.zeroed, -1)  # before the weights of inputs that are always zero
    ordered, order = scores.sort(dim=1)
    cumulative = ordered.clamp_(min=0).double().cumsum(1)
    share = cumulative / cumulative[:, -1:].clamp(min=torch.finfo(torch.float64).tiny)  # (out, in), rising in a row
    removed = lowest_of_matrix(share, sparsity, None if pattern.zeroed is None else pattern.zeroed.gather(1, order))
    return weight.masked_fill(torch.zeros_like(removed).scatter_(1, order, removed), 0)


@pruner("wanda", needs="diagonal", variant=Pruner(wanda_variant, "diagonal"))
def wanda(weight: Tensor, stats: InputStats, sparsity: float, pattern: Pattern) -> Tensor:
    """Remove the lowest |W_ij| * ||X_j||_2 of each row; the weights that stay are untouched."""
    return weight.masked_fill(mask_of(wanda_scores(weight, stats), sparsity, pattern, lowest_of_rows), 0)
