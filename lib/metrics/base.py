"""What a metric is."""

from collections.abc import Callable
from dataclasses import dataclass

from ..esd import Spectrum
from ..registry import Registry


@dataclass(frozen=True)
class Metric:
    """score(spectrum) -> float, higher for worse trained matrices if sign is +1, for better if -1.

    version is part of the cache's key: raise it when the definition changes.
    """

    score: Callable[[Spectrum], float]
    sign: int
    version: int = 1


METRICS: Registry[Metric] = Registry("--WW_metric")


def metric(name: str, *, sign: int):
    """Register a function of a `Spectrum` as the metric `name`."""
    return METRICS.register(name, lambda function: Metric(function, sign))
