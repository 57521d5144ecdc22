"""FARMS: the ESD of fixed-aspect-ratio windows (Hu et al. 2025, arXiv 2506.06280)."""

from itertools import product

import torch

from ..esd import Fit, Spectrum, squared_singular_values
from .base import power_law
from .power_law import alpha_peak

WINDOW = 2000  # the largest window
POSITIONS = 15  # along each axis


def _offsets(size: int, window: int) -> list[int]:
    step = max(1, (size - window) // (POSITIONS - 1))
    return [i * step for i in range(POSITIONS) if i * step + window <= size]


@power_law("farms")
def farms(spectrum: Spectrum) -> Fit:
    """alpha_peak of the pooled eigenvalues of square windows slid over the matrix.

    Square windows take away the bias that a matrix's aspect ratio puts on its alpha. Up to 225 windows of up to
    2000 x 2000: many times the cost of alpha_peak.
    """
    weight = spectrum.weight
    size = min(WINDOW, *weight.shape)
    rows, columns = (_offsets(length, size) for length in weight.shape)
    windows = [squared_singular_values(weight[r : r + size, c : c + size]) for r, c in product(rows, columns)]
    return alpha_peak(Spectrum.from_eigenvalues(torch.cat(windows)))
