"""Magnitude pruning."""

from torch import Tensor

from ..masks import Pattern, lowest_of_matrix
from ..stats import InputStats
from .base import mask_of, pruner


@pruner("magnitude", needs="nothing")
def magnitude(weight: Tensor, stats: InputStats | None, sparsity: float, pattern: Pattern) -> Tensor:
    """Remove the smallest |W|, the threshold taken over the whole matrix."""
    return weight.masked_fill(mask_of(weight.abs().float(), sparsity, pattern, lowest_of_matrix), 0)
