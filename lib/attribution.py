"""Which matrix a change of the loss comes from, when all change at once: integrated gradients over weights."""

import torch
from torch import Tensor

from . import ranks
from .gradients import visit_gradients
from .model import LanguageModel, Matrix


def attribute(
    model: LanguageModel, before: dict[Matrix, Tensor], windows: Tensor, *, batch_size: int = 1
) -> dict[str, float]:
    """matrix name -> its part of the loss's change from the weights `before`, (out, in) each, to the model's own.

    windows (n, seqlen) token ids, of which each rank takes its share; the loss is the mean over their predicted tokens,
    in nats. Matrix k's part is <dL/dW_k half way, after_k - before_k>: integrated gradients (Sundararajan et al. 2017)
    by the midpoint rule, so that the parts sum to L(after) - L(before) but for the rule's error. `before` is emptied
    and the model left half way, so that one copy of its weights is held beside it and no more.
    """
    changes = {}
    for matrix in model.matrices:
        was, weight = before.pop(matrix), matrix.weight
        changes[matrix] = weight - was
        matrix.write((was + weight) / 2)
    found = {matrix: torch.zeros((), dtype=torch.float64, device=matrix.weight.device) for matrix in model.matrices}
    predicted = windows.shape[0] * (windows.shape[1] - 1)

    def add(matrix: Matrix, gradient: Tensor) -> None:
        found[matrix] += (gradient * changes[matrix]).sum().double() / predicted

    visit_gradients(model, windows, add, batch_size=batch_size)
    products = torch.stack([product.cpu() for product in found.values()])
    ranks.add_up(products)
    return dict(zip((matrix.name for matrix in found), products.tolist(), strict=True))
