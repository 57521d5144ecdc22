"""PL_Alpha_Hill and its relatives: the exponent of the ESD's tail (Lu et al. 2024, section 3.2).

They differ in where the tail may start.
"""

import math

from ..esd import Fit, Spectrum
from .base import power_law


@power_law("alpha_peak")
def alpha_peak(spectrum: Spectrum) -> Fit:
    """Best fit with the tail starting at the ESD's peak x: log10(0.95 x) <= lam_min <= 1.5 x.

    The lower bound compares a logarithm with an eigenvalue. It is a slip of the published code that
    nearly never binds; it is kept so that published numbers reproduce.
    """
    x = spectrum.peak
    return spectrum.best_fit(spectrum.starts(math.log10(0.95 * x), 1.5 * x))


@power_law("alpha_mid")
def alpha_mid(spectrum: Spectrum) -> Fit:
    """The Hill estimate on the upper half of the eigenvalues, i = N // 2, without a search."""
    return spectrum.fit_at(len(spectrum.eigenvalues) // 2)


@power_law("alpha_peak_window")
def alpha_peak_window(spectrum: Spectrum) -> Fit:
    """As alpha_peak with the window of the paper on both sides: 0.95 x <= lam_min <= 1.5 x."""
    x = spectrum.peak
    return spectrum.best_fit(spectrum.starts(0.95 * x, 1.5 * x))


@power_law("alpha")
def alpha(spectrum: Spectrum) -> Fit:
    """Best fit over every tail start (Clauset, Shalizi & Newman 2009; WeightWatcher's `alpha`)."""
    return spectrum.full_fit
