"""PL_Alpha_Hill and its relatives: the exponent of the ESD's tail (AlphaPruning, section 3).

They differ in where the tail may start. A larger alpha is a lighter tail, a less well trained matrix,
one that can lose more weights.
"""

import math

from ..esd import DegenerateSpectrumError, Spectrum
from .base import metric


@metric("alpha_peak", sign=+1)
def alpha_peak(spectrum: Spectrum) -> float:
    """Best fit with the tail starting at the ESD's peak x: log10(0.95 x) <= lam_min <= 1.5 x.

    The lower bound compares a logarithm with an eigenvalue. It is a slip of the published code that
    nearly never binds; it is kept so that published numbers reproduce.
    """
    x = spectrum.peak
    return spectrum.best_fit(spectrum.starts(math.log10(0.95 * x), 1.5 * x)).alpha


@metric("alpha_mid", sign=+1)
def alpha_mid(spectrum: Spectrum) -> float:
    """The Hill estimate on the upper half of the eigenvalues, i = N // 2, without a search."""
    middle = len(spectrum.eigenvalues) // 2
    alpha = float(spectrum.hill[middle]) if len(spectrum.eigenvalues) else math.inf
    if not math.isfinite(alpha):
        raise DegenerateSpectrumError("alpha_mid is undefined: the upper half of the spectrum is constant or empty")
    return alpha


@metric("alpha_peak_window", sign=+1)
def alpha_peak_window(spectrum: Spectrum) -> float:
    """As alpha_peak with the window of the paper on both sides: 0.95 x <= lam_min <= 1.5 x."""
    x = spectrum.peak
    return spectrum.best_fit(spectrum.starts(0.95 * x, 1.5 * x)).alpha


@metric("alpha", sign=+1)
def alpha(spectrum: Spectrum) -> float:
    """Best fit over every tail start, the classic estimator of Clauset et al. and WeightWatcher."""
    return spectrum.best_fit(spectrum.starts()).alpha
