"""What a metric is."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from ..esd import Fit
from ..options import Option, no_auto
from ..registry import Registry


@dataclass(frozen=True)
class Metric:
    """score(spectrum, **options) -> float, finite; larger for worse trained matrices if sign is +1, for better if -1.

    fit(spectrum, **options) is the power law behind the score, where that is one's exponent: what the pictures draw.
    version is part of the cache's key: raise it when the definition changes. A score that the spectrum does not
    have raises DegenerateSpectrumError. `options` are its parameters, which are flags.
    """

    score: Callable[..., float]
    sign: int
    fit: Callable[..., Fit] | None = None
    version: int = 1
    options: tuple[Option, ...] = ()

    def __post_init__(self):
        no_auto(self.options)

    def at(self, values: Mapping[str, object]) -> "Metric":
        """The metric with its options at these values, where they are given, else at their defaults."""
        own = {option.name: values.get(option.name, option.default) for option in self.options}
        score, fit = (function and functools.partial(function, **own) for function in (self.score, self.fit))
        return replace(self, score=score, fit=fit, options=()) if own else self

    def entry(self, name: str, values: Mapping[str, object]) -> str:
        """What its values are kept under: its name, with the options that are not at their defaults."""
        changed = [option for option in self.options if values.get(option.name, option.default) != option.default]
        return "-".join([name, *(option.part(values[option.name]) for option in changed)])


METRICS: Registry[Metric] = Registry("--WW_metric")


def metric(name: str, *, sign: int, version: int = 1, options: tuple[Option, ...] = ()):
    """Register a function of a `Spectrum` as the metric `name`."""
    return METRICS.register(name, lambda function: Metric(function, sign, version=version, options=options))


def power_law(name: str, *, version: int = 1, options: tuple[Option, ...] = ()):
    """Register a function from a `Spectrum` to a `Fit`: its exponent is the metric `name`.

    A larger alpha is a lighter tail, a less well trained matrix, one that can lose more weights.
    """

    def make(fit: Callable[..., Fit]) -> Metric:
        return Metric(lambda spectrum, **own: fit(spectrum, **own).alpha, +1, fit, version, options)

    return METRICS.register(name, make)
