"""What a metric is."""

from collections.abc import Callable
from dataclasses import dataclass

from ..esd import Fit, Spectrum
from ..registry import Registry


@dataclass(frozen=True)
class Metric:
    """score(spectrum) -> float, finite; larger for worse trained matrices if sign is +1, for better if -1.

    fit(spectrum) is the power law behind the score, where the score is one's exponent: what the pictures draw.
    version is part of the cache's key: raise it when the definition changes. A score that the spectrum does not
    have raises DegenerateSpectrumError.
    """

    score: Callable[[Spectrum], float]
    sign: int
    fit: Callable[[Spectrum], Fit] | None = None
    version: int = 1


METRICS: Registry[Metric] = Registry("--WW_metric")


def metric(name: str, *, sign: int):
    """Register a function of a `Spectrum` as the metric `name`."""
    return METRICS.register(name, lambda function: Metric(function, sign))


def power_law(name: str):
    """Register a function from a `Spectrum` to a `Fit`: its exponent is the metric `name`.

    A larger alpha is a lighter tail, a less well trained matrix, one that can lose more weights.
    """
    return METRICS.register(name, lambda fit: Metric(lambda spectrum: fit(spectrum).alpha, sign=+1, fit=fit))
