"""WeightWatcher's columns that are functions of the eigenvalues (Martin, Peng & Mahoney 2021).

With lam the eigenvalues of the smaller Gram matrix, not normalised. Each agrees with the column of the same name of
WeightWatcher.analyze. The published code gave all of them the sign of alpha; here a larger norm means fewer zeros.
"""

import math

from ..esd import DegenerateSpectrumError, Spectrum
from .base import metric


@metric("entropy", sign=+1)
def entropy(spectrum: Spectrum) -> float:
    """-sum p ln p / ln rank, p = lam / sum(lam): 1 for a flat spectrum, as of noise; towards 0 for a few directions.

    WeightWatcher adds 1e-10 to each p and to the rank, and so does this. Undefined below rank two.
    """
    lam = spectrum.eigenvalues
    if len(lam) < 2:
        raise DegenerateSpectrumError("entropy is undefined: the matrix has a rank below two")
    p = lam / lam.sum() + 1e-10
    return float(-(p * p.log()).sum() / math.log(len(lam) + 1e-10))


@metric("stable_rank", sign=+1)
def stable_rank(spectrum: Spectrum) -> float:
    """sum(lam) / max(lam): how many directions carry the matrix; large for noise."""
    return float(spectrum.eigenvalues.sum()) / spectrum.largest


@metric("spectral_norm", sign=-1)
def spectral_norm(spectrum: Spectrum) -> float:
    """max(lam), the largest singular value squared, as WeightWatcher's column; grows in training."""
    return spectrum.largest


@metric("log_norm", sign=-1)
def log_norm(spectrum: Spectrum) -> float:
    """log10 sum(lam), of the squared Frobenius norm."""
    return math.log10(spectrum.largest * stable_rank(spectrum))


@metric("log_spectral_norm", sign=-1)
def log_spectral_norm(spectrum: Spectrum) -> float:
    """log10 max(lam)."""
    return math.log10(spectrum.largest)


@metric("alpha_weighted", sign=+1)
def alpha_weighted(spectrum: Spectrum) -> float:
    """alpha * log10 max(lam), "alpha-hat", with the alpha of the best fit over every tail start."""
    return spectrum.full_fit.alpha * log_spectral_norm(spectrum)


@metric("log_alpha_norm", sign=+1)
def log_alpha_norm(spectrum: Spectrum) -> float:
    """log10 sum(lam^alpha), of the Schatten norm at that alpha."""
    return float((spectrum.full_fit.alpha * spectrum.logs).logsumexp(0)) / math.log(10)
