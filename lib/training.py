"""Training of the weights that pruning has left: Adam with the masks fixed, whatever the loss."""

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from . import ranks
from .errors import RunError
from .gradients import OVERWRITTEN
from .model import Matrix
from .precision import choose_autocast, mixed_precision

SEED = 0  # of the order of the steps


@dataclass(frozen=True)
class Recipe:
    """The training schedule: `windows` a step over all ranks; Adam's learning rate rises over `warmup_steps`, at most a
    quarter of all, and decays along a cosine to `min_lr_ratio` times its peak.

    `learning_rate`, the peak, is relative to the root mean square of each matrix's surviving weights (the relative step
    size of Adafactor, Shazeer and Stern 2018, arXiv 1804.04235): one rate then serves models whose weights differ in
    size, of which a factor of ten is common.
    """

    epochs: int
    windows: int
    learning_rate: float
    min_lr_ratio: float
    warmup_steps: int = 0

    @property
    def step(self) -> int:
        """Windows a step: at least one for each process."""
        return max(self.windows, ranks.world_size())

    def batch(self, most: int, counted: int = 0) -> int:
        """Windows a pass, `most` at most, such that no pass of a rank is part of two steps, or of what lies on both
        sides of the first `counted` windows.
        """
        whole = 1
        if self.step % ranks.world_size() == 0 and counted % ranks.world_size() == 0:
            whole = math.gcd(self.step // ranks.world_size(), counted // ranks.world_size())
        return max(size for size in range(1, max(1, most) + 1) if whole % size == 0)

    def lr_factor(self, step: int, steps: int) -> float:
        """The learning-rate factor of a step, counted from 0: warm-up, then cosine decay to `min_lr_ratio`."""
        rising = min(self.warmup_steps, steps // 4)
        if step < rising:
            return (step + 1) / rising
        falling = (step - rising) / (steps - rising)
        return self.min_lr_ratio + (1 - self.min_lr_ratio) * (1 + math.cos(math.pi * falling)) / 2


def train(
    matrices: list[Matrix],
    windows: int,
    batch_size: int,
    loss: Callable[[int], Tensor],
    recipe: Recipe,
    frozen: Iterable[nn.Parameter] = (),
) -> list[float]:
    """Train the surviving weights of the matrices; the loss of each epoch's steps, over all ranks.

    This rank has so many `windows`, every size()-th of all; `loss(batch)` is the sum over a batch of `batch_size` of
    them, batches counted from 0, in a scale of the caller's choice (Adam sees none). A step takes the windows that
    follow one another, so that it is the same for any number of ranks; their order is drawn anew each epoch. Weights,
    gradients and moments are in float32, passes in bfloat16 where the processor multiplies in it or the model is in
    half precision. `frozen`, the parameters that the passes read as well, are in float32 meanwhile: no layer takes two
    half types. Zeros stay zeros. Raises RunError where a weight is no longer finite.
    """
    of_step = batches_of_steps(windows, batch_size, recipe.step)
    weights = list(dict.fromkeys(matrix.stored for matrix in matrices))
    generator = torch.Generator().manual_seed(SEED)
    with _trainable(weights, frozen, loss) as passes:
        masks = [weight != 0 for weight in weights]
        peaks = [recipe.learning_rate * size for size in _sizes(weights)]
        groups = [{"params": [weight]} for weight in weights]
        adam = torch.optim.Adam(groups, lr=recipe.learning_rate, fused=weights[0].device.type == "cpu" or None)
        steps = recipe.epochs * len(of_step)
        losses: list[Tensor] = []
        guard = nullcontext
        for epoch in range(recipe.epochs):
            for place, step in enumerate(torch.randperm(len(of_step), generator=generator).tolist()):
                for batch in of_step[step]:
                    try:
                        losses.append(_backward(loss, batch, passes, guard))
                    except RuntimeError as error:
                        if losses or OVERWRITTEN not in str(error):
                            raise
                        adam.zero_grad()  # of what the pass back came to
                        guard = _copies_of_saved_tensors
                        losses.append(_backward(loss, batch, passes, guard))
                for weight, mask in zip(weights, masks, strict=True):
                    weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad.mul_(mask)
                    ranks.all_reduce(weight.grad)
                factor = recipe.lr_factor(epoch * len(of_step) + place, steps)
                for group, peak in zip(adam.param_groups, peaks, strict=True):
                    group["lr"] = peak * factor
                adam.step()
                adam.zero_grad()
    of_epochs = torch.stack(losses).double().view(recipe.epochs, -1).sum(1).cpu()
    ranks.all_reduce(of_epochs)
    for matrix in matrices:
        if not matrix.weight.isfinite().all():
            raise RunError(f"{matrix.name}: holds NaN or infinity after recovery; leave out --recover")
    return of_epochs.tolist()


def _backward(loss: Callable[[int], Tensor], batch: int, passes: Callable, guard: Callable) -> Tensor:
    """A batch's loss, its gradient being added to the weights'."""
    with guard():
        with torch.enable_grad(), passes():
            found = loss(batch)
        found.backward()
    return found.detach()


def _copies_of_saved_tensors() -> saved_tensors_hooks:
    """While gradients are taken of what is copied, at twice the memory: for blocks that write into what they read."""
    return saved_tensors_hooks(lambda saved: saved.detach().clone(), lambda copied: copied)


def _sizes(weights: list[nn.Parameter]) -> list[float]:
    """Of each the root mean square of the weights that are not zero."""
    found = [weight.norm() / weight.count_nonzero().clamp(min=1).sqrt() for weight in (w.detach() for w in weights)]
    return torch.stack([size.to(found[0].device) for size in found]).tolist()


def batches_of_steps(windows: int, batch_size: int, step: int) -> list[list[int]]:
    """This rank's batches of each step; some steps may have none, where the last windows are other ranks'."""
    last = -(-sum(ranks.all_gather(windows)) // step)
    batches: list[list[int]] = [[] for _ in range(last)]
    for batch in range(-(-windows // batch_size)):
        batches[(batch * batch_size * ranks.world_size() + ranks.rank()) // step].append(batch)
    return batches


@contextmanager
def _trainable(
    weights: list[nn.Parameter], frozen: Iterable[nn.Parameter], loss: Callable[[int], Tensor]
) -> Iterator[Callable]:
    """While the weights are in float32 and take gradients; gives the context that passes are run in.

    In the end the weights are rounded to their own type again, and the frozen parameters are what they were.
    """
    dtype, device = weights[0].dtype, weights[0].device.type
    before = {parameter: parameter.data for parameter in frozen if parameter.is_floating_point()}
    try:
        for parameter in (*weights, *before):
            parameter.data = parameter.data.float()
        for weight in weights:
            weight.requires_grad_(True)
        with torch.no_grad():
            passes, _ = choose_autocast(functools.partial(mixed_precision, dtype, device), lambda: loss(0))
        yield passes
    finally:
        for weight in weights:
            weight.requires_grad_(False)
            weight.data, weight.grad = weight.data.to(dtype), None
        for parameter, data in before.items():
            parameter.data = data
