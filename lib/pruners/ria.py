"""RIA: relative importance and activations (Zhang et al., "Plug-and-Play", ICLR 2024)."""

import torch
from torch import Tensor

from ..masks import Pattern, lowest_of_rows
from ..stats import InputStats
from .base import mask_of, pruner


@pruner("ria", needs="diagonal")
def ria(weight: Tensor, stats: InputStats, sparsity: float, pattern: Pattern) -> Tensor:
    """Remove the lowest (|W_ij| / sum_i |W_ij| + |W_ij| / sum_j |W_ij|) * ||X_j||_2^0.5 of each row.

    Relative to its row and its column, so that no row or column is emptied for being small as a whole.
    """
    size = weight.abs().float()
    tiny = torch.finfo(torch.float32).tiny  # for rows and columns of zeros
    relative = size / size.sum(0).clamp(min=tiny) + size / size.sum(1, keepdim=True).clamp(min=tiny)
    scores = relative * stats.sum_squares.to(weight.device).pow(0.25)
    return weight.masked_fill(mask_of(scores, sparsity, pattern, lowest_of_rows), 0)
