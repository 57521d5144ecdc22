"""Block recovery: gradient descent on the weights that a block has left, towards the dense block's output."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import chain
from statistics import fmean

import torch
from torch import Tensor, nn

from . import ranks
from .activations import Activations
from .errors import RunError
from .model import Matrix
from .precision import mixed_precision

EPOCHS = 4
WINDOWS = 4  # a step, over all ranks; where one batch holds more, one batch a rank
RATE = 1e-4  # Adam's, at the start; it falls to zero along a cosine
SEED = 0


def recover(
    matrices: list[Matrix],
    forward: Callable[[int], Tensor],
    wanted: Activations,
    others: Iterable[nn.Parameter] = (),
) -> None:
    """Train the surviving weights of one block so that `forward(batch)` comes close to `wanted[batch]`, (B, S, d).

    The squared error relative to what is wanted is minimised by Adam, EPOCHS times over the batches: weights, gradients
    and moments in float32, forward and backward passes in bfloat16 where the processor multiplies in it or the model is
    in half precision. The block's `others` are in float32 meanwhile: no layer takes two half types. Zeros stay zeros,
    and nothing of the optimiser outlives the block. Raises RunError where a weight is no longer finite.
    """
    batches_a_step = max(1, round(WINDOWS / len(wanted[0]) / ranks.size()))
    steps = min(ranks.gather(-(-len(wanted) // batches_a_step)))  # the same on every rank
    own = [float(batch.float().square().mean()) for batch in wanted]
    scale = fmean(chain(*ranks.gather(own))) or 1.0  # of all ranks, for their gradients are added
    with _in_float32(others), _trainable(matrices) as (weights, mixed):
        mixed = mixed if _runs(forward, mixed) else nullcontext
        kept = [weight != 0 for weight in weights]
        adam = torch.optim.Adam(weights, lr=RATE)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, EPOCHS * steps)
        for batches in _rounds(len(wanted), steps):
            for batch in batches:
                with torch.enable_grad(), mixed():
                    error = (forward(batch).float() - wanted[batch].float()).square().sum()
                    (error / scale).backward()
            for weight, mask in zip(weights, kept, strict=True):
                weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad.mul_(mask)
                ranks.add_up(weight.grad)
            adam.step()
            adam.zero_grad()
            schedule.step()
    for matrix in matrices:
        if not matrix.weight.isfinite().all():
            raise RunError(f"{matrix.name}: holds NaN or infinity after recovery; leave out --recover")


@torch.no_grad()
def _runs(forward: Callable[[int], Tensor], mixed: Callable) -> bool:
    """Whether the block can run in mixed precision: the code of a few adds up tensors of two types."""
    try:
        with mixed():
            forward(0)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        return False
    return True


def _rounds(batches: int, steps: int) -> Iterator[list[int]]:
    """The batches of each step: EPOCHS random orders, each cut into `steps` parts."""
    generator = torch.Generator().manual_seed(SEED)
    for _ in range(EPOCHS):
        yield from (part.tolist() for part in torch.randperm(batches, generator=generator).tensor_split(steps))


@contextmanager
def _in_float32(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Parameters in float32; in the end they are what they were."""
    before = {parameter: parameter.data for parameter in parameters if parameter.is_floating_point()}
    try:
        for parameter, data in before.items():
            parameter.data = data.float()
        yield
    finally:
        for parameter, data in before.items():
            parameter.data = data


@contextmanager
def _trainable(matrices: list[Matrix]) -> Iterator[tuple[list[nn.Parameter], Callable]]:
    """The matrices' parameters, in float32 and taking gradients, and the context their forward passes need for that.

    In the end they are rounded to their own type again.
    """
    weights = list(dict.fromkeys(matrix.stored for matrix in matrices))
    dtype, device = weights[0].dtype, weights[0].device.type
    try:
        for weight in weights:
            weight.data = weight.data.float()
            weight.requires_grad_(True)
        yield weights, lambda: mixed_precision(dtype, device)
    finally:
        for weight in weights:
            weight.requires_grad_(False)
            weight.data, weight.grad = weight.data.to(dtype), None
