"""Block recovery: what pruning has left of a block is trained towards the dense block's output.

Transformer matching (3BASiL, arXiv 2603.01376): masks fixed, Adam on the sum of squares, and then the next block.
"""

from collections.abc import Callable, Iterable
from itertools import chain
from statistics import fmean

from torch import Tensor, nn

from . import ranks
from .activations import Activations
from .model import Matrix
from .training import Recipe, train

# The best of six recipes on windows held out of the calibration text, for four blocks of one model (docs/log.md). The
# paper's, 20 epochs at 2e-5 in steps of 8 windows, is not among them.
RECIPE = Recipe(epochs=1, windows=2, learning_rate=1e-3, min_lr_ratio=0.2)


def recover(
    matrices: list[Matrix],
    forward: Callable[[int], Tensor],
    wanted: Activations,
    windows: int,
    frozen: Iterable[nn.Parameter] = (),
) -> tuple[float, float]:
    """Train the surviving weights of one block so that `forward(batch)` comes close to `wanted[batch]`, (B, S, d).

    The batches are of this rank's `windows`, as many in each but the last; `frozen` are the block's other parameters.
    Returns the squared error relative to what is wanted, the mean over the first epoch and over the last
    (lib/training.py says the rest). Nothing of the optimiser outlives the block.
    """
    squares = list(chain(*ranks.all_gather([float(batch.float().square().mean()) for batch in wanted])))
    scale = fmean(squares) or 1.0  # of all ranks, for their gradients are added

    def loss(batch: int) -> Tensor:
        return (forward(batch).float() - wanted[batch].float()).square().sum() / scale

    elements = sum(ranks.all_gather(windows)) * wanted[0][0].numel()
    found = [total / elements for total in train(matrices, windows, len(wanted[0]), loss, RECIPE, frozen)]
    return found[0], found[-1]
