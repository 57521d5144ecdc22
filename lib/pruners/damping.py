"""Factorisations of Gram matrices with a damped diagonal, tried again with more damping where they fail."""

from collections.abc import Callable
from contextlib import suppress

import torch
from torch import Tensor

from ..errors import RunError, linalg_errors
from ..stats import InputStats

DAMPING = 0.01  # of the mean diagonal
RETRIES = 3  # each with ten times the damping


def damped(stats: InputStats, what: str, factorise: Callable[[float], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """`factorise(damping)`, the damping as a share of the mean diagonal; `what` it does, for messages.

    Where it raises torch.linalg.LinAlgError or gives NaN or infinity it is tried again, RETRIES times, each noted in
    `stats.events`. Raises RunError where none succeeds.
    """
    for attempt in range(RETRIES + 1):
        damping = DAMPING * 10**attempt
        with suppress(torch.linalg.LinAlgError), linalg_errors():
            found = factorise(damping)
            if torch.stack([part.isfinite().all() for part in found]).all():
                return found
        stats.events.append(f"{what} failed with damping {damping:g} of the mean diagonal")
    raise RunError(
        f"the {what} of its input's Gram matrix fails even with damping {damping:g} of the mean diagonal; "
        "give more calibration data (--nsamples) or prune with wanda"
    )


def add_damping(gram: Tensor, damping: float) -> Tensor:
    """G + damping * mean(diag G), a new (in, in)."""
    gram = gram.clone()
    gram.diagonal().add_(damping * gram.diagonal().mean())
    return gram
