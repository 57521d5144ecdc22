"""Which matrix a change of the loss comes from, when all change at once: integrated gradients over weights."""

from collections.abc import Mapping

import torch
from torch import Tensor

from . import ranks
from .gradients import visit_gradients
from .model import LanguageModel, Matrix, kept

Weights = Mapping[Matrix, Tensor]  # of every prunable matrix (out, in)


def attribute(
    model: LanguageModel, before: Weights, after: Weights, windows: Tensor, *, batch_size: int = 1
) -> dict[str, float]:
    """matrix name -> its part of the loss's change from the weights `before` to those `after`.

    windows (n, seqlen) token ids, of which each rank takes its share; the loss is the mean over their predicted tokens,
    in nats. Matrix k's part is <dL/dW_k half way, after_k - before_k>: integrated gradients (Sundararajan et al. 2017)
    by the midpoint rule, so that the parts sum to L(after) - L(before) but for the rule's error. The weights are left
    as they were found.
    """
    with kept(model):
        for matrix in model.matrices:
            matrix.write((before[matrix] + after[matrix]) / 2)
        changes = {matrix: after[matrix] - before[matrix] for matrix in model.matrices}
        return _products(model, changes, windows, batch_size)


def _products(model: LanguageModel, changes: Weights, windows: Tensor, batch_size: int) -> dict[str, float]:
    """<dL/dW_k, change of W_k> of every matrix at the weights as they are."""
    found = dict.fromkeys((matrix.name for matrix in model.matrices), 0.0)
    predicted = windows.shape[0] * (windows.shape[1] - 1)

    def add(matrix: Matrix, gradient: Tensor) -> None:
        found[matrix.name] += float((gradient * changes[matrix]).sum()) / predicted

    visit_gradients(model, windows, add, batch_size=batch_size)
    products = torch.tensor([*found.values()], dtype=torch.float64)
    ranks.add_up(products)
    return dict(zip(found, products.tolist(), strict=True))
