"""What a pruner is."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from ..masks import Pattern, lowest_of_groups
from ..options import Option, no_auto
from ..registry import Registry
from ..stats import NEEDS


@dataclass(frozen=True)
class Pruner:
    """prune(weight (out, in), stats, sparsity, pattern, **options) -> pruned (out, in), same device and dtype.

    The weight passed in is never changed. What `pattern.zeroed` marks is zero in what comes back and counts towards the
    sparsity, as `mask_of` sees to; the weight passed in may hold other values there, which the rest makes up for.
    `needs` is what the pruner reads of its `InputStats`; with "nothing" no calibration is run and stats is None.
    `variant` is the pruner that --use_variant selects; `options` are its parameters, which are flags.
    """

    prune: Callable[..., Tensor]
    needs: str
    variant: "Pruner | None" = None
    options: tuple[Option, ...] = ()

    def __post_init__(self):
        if self.needs not in NEEDS:
            raise ValueError(f"needs must be one of {NEEDS}, not {self.needs!r}")
        no_auto(self.options)

    def at(self, values: Mapping[str, object]) -> "Pruner":
        """The pruner with its options at these values."""
        own = {option.name: values[option.name] for option in self.options}
        return replace(self, prune=functools.partial(self.prune, **own)) if own else self


PRUNERS: Registry[Pruner] = Registry("--prune_method")


def pruner(name: str, *, needs: str, variant: Pruner | None = None, options: tuple[Option, ...] = ()):
    """Register a function with `Pruner.prune`'s signature as the pruner `name`."""
    return PRUNERS.register(name, lambda function: Pruner(function, needs, variant, options))


def mask_of(scores: Tensor, sparsity: float, pattern: Pattern, unstructured: Callable[..., Tensor]) -> Tensor:
    """The weights to remove, those that are zero already among them: by `unstructured(scores, sparsity, zeroed)`
    (lib/masks.py), or N of every M where the pattern asks.
    """
    if pattern.group is None:
        return unstructured(scores, sparsity, pattern.zeroed)
    return lowest_of_groups(scores, pattern.zeros(sparsity), pattern.group, pattern.zeroed)
