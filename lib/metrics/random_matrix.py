"""Distance from randomness: WeightWatcher's own Marchenko-Pastur fit and its own randomisation.

Slow: seconds a matrix, where a metric of the eigenvalues takes milliseconds.
"""

import contextlib
from functools import cache

import numpy

from ..esd import DegenerateSpectrumError, Spectrum
from .base import metric

SEED = 0  # of the shuffled weights, the same for every matrix


@cache
def _watcher():
    import weightwatcher  # takes seconds to import, and no other metric needs it

    return weightwatcher.WeightWatcher()


@metric("mp_softrank", sign=+1)
def mp_softrank(spectrum: Spectrum) -> float:
    """lambda_plus / max(lam), lambda_plus the bulk edge of WeightWatcher's Marchenko-Pastur fit; 1 for noise."""
    if not spectrum.largest or len(spectrum.values) < 2:
        raise DegenerateSpectrumError("mp_softrank is undefined: one eigenvalue has no bulk")
    small, large = sorted(spectrum.weight.shape)
    values = spectrum.values.numpy()
    with numpy.errstate(all="ignore"):
        fitted = _watcher().mp_fit(
            values, large, small, 1, "", 0, 0, plot=False, savefig=False, savedir="", color="", hist_alpha=1,
            rescale=True, orig_evals=values,
        )  # fmt: skip
    return _finite("mp_softrank", fitted[2])


@metric("random_distance", sign=-1)
def random_distance(spectrum: Spectrum) -> float:
    """Jensen-Shannon distance between the sorted eigenvalues and those of the same weights shuffled, both summing
    to 1 (WeightWatcher's column `rand_distance`); 0 for noise. The shuffle is seeded."""
    from weightwatcher import RMT_Util

    if not spectrum.largest or len(spectrum.values) < 2:
        raise DegenerateSpectrumError("random_distance is undefined: one eigenvalue is a distribution of its own")
    with _numpy_seed(SEED), numpy.errstate(all="ignore"):
        shuffled = _watcher().random_eigenvalues([spectrum.weight.float().cpu().numpy()], len(spectrum.values))
        return _finite("random_distance", RMT_Util.jensen_shannon_distance(spectrum.values.numpy(), shuffled))


def _finite(name: str, value: float) -> float:
    if not numpy.isfinite(value):
        raise DegenerateSpectrumError(f"{name}: WeightWatcher found none")
    return float(value)


@contextlib.contextmanager
def _numpy_seed(seed: int):
    """WeightWatcher draws from numpy's global generator: seed it for a while and put it back."""
    state = numpy.random.get_state()
    numpy.random.seed(seed)
    try:
        yield
    finally:
        numpy.random.set_state(state)
