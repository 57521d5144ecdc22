"""The asymmetric target: aim a layer part of the way at the dense model's output, not at its own on pruned inputs.

As in GPTAQ (Li et al., ICML 2025, arXiv 2504.02692), which aims all of the way, for quantisation.
"""

import torch
from torch import Tensor

from ..stats import InputStats

RIDGE = 0.01  # of the mean diagonal


def drift(stats: InputStats) -> Tensor:
    """D (in, in) = (C - G)(G + ridge)^-1, G = X^T X and C = X_d^T X: X D^T is the best guess of X_d - X from X."""
    ridged = stats.gram.clone()
    ridged.diagonal().add_(RIDGE * ridged.diagonal().mean())
    return torch.linalg.solve(ridged, (stats.cross - stats.gram).T).T


def aim(weight: Tensor, stats: InputStats, asymmetry: float) -> Tensor:
    """The weights W that solve min ||X W^T - ((1 - a) X + a X_d) W_0^T||^2 + ridge ||W - W_0||^2, none removed yet.

    X_d (tokens, in) is what the dense model reads where the pruned one reads X. Any pruner then goes on from W:
    with a Gram matrix of X its own least squares have the same minimum. An input of which some tokens have no
    counterpart (an expert that the dense model chose for others) is left at a = 0, which is noted.
    """
    if stats.paired < stats.tokens:
        note = f"asymmetry: {stats.tokens - stats.paired} of its {stats.tokens} tokens have no dense input; left out"
        if note not in stats.events:
            stats.events.append(note)
        return weight
    return weight + asymmetry * (weight.float() @ stats.derive(drift).to(weight.device)).to(weight.dtype)
