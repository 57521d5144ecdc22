"""Asymmetric calibration: the target of a layer lies between its output on pruned inputs and the dense model's.

As in GPTAQ (Li et al., ICML 2025, arXiv 2504.02692), for quantisation, where the target is the dense output.
"""

import torch
from torch import Tensor

from ..stats import InputStats
from .damping import add_damping, damped


def factor(stats: InputStats) -> Tensor:
    """The lower Cholesky factor of G + ridge, G = X^T X (in, in)."""

    def factorise(ridge: float) -> tuple[Tensor]:
        return (torch.linalg.cholesky(add_damping(stats.gram, ridge)),)

    return damped(stats, "Cholesky factorisation", factorise)[0]


def asymmetric_weights(weight: Tensor, stats: InputStats, asymmetry: float) -> Tensor:
    """The weights W that solve min ||X W^T - T||^2 + ridge ||W - W_0||^2, none removed yet, with the target
    T = ((1 - a) X + a X_d) W_0^T, and + a (R_d - R) for the matrix that writes the block's output.

    X_d (tokens, in) is what the dense model reads where the pruned one reads X, and R what the block adds the matrix's
    output to: that one is aimed at the dense block's output itself, and makes up for what the residual stream has
    gathered. With C = X_d^T X, W = W_0 + a (W_0 (C - G) + (R_d - R)^T X)(G + ridge)^-1. Any pruner then goes on from W:
    with the Gram matrix of X its own least squares have the same minimum. An input of which some tokens have no
    counterpart (an expert that the dense model chose for others) is left at a = 0, which is noted.
    """
    if stats.paired < stats.tokens:
        note = f"asymmetry: {stats.tokens - stats.paired} of its {stats.tokens} tokens have no dense input; left out"
        if note not in stats.events:
            stats.events.append(note)
        return weight
    gap = weight.float() @ (stats.cross - stats.gram).to(weight.device)
    if stats.residual is not None:
        gap += stats.residual.to(weight.device)
    change = torch.cholesky_solve(gap.T, stats.derive(factor).to(weight.device)).T
    return weight + asymmetry * change.to(weight.dtype)
