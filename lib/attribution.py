"""Which matrix a change of the loss comes from, when all change at once: integrated gradients over weights."""

import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from . import ranks
from .gradients import visit_gradients
from .model import LanguageModel, Matrix, kept

Weights = Mapping[Matrix, Tensor]  # of every prunable matrix (out, in)


def attribute(
    model: LanguageModel, path: Sequence[Weights], windows: Tensor, *, batch_size: int = 1
) -> dict[str, list[float]]:
    """matrix name -> its part of the loss's change over each straight piece of the `path` through weight space.

    windows (n, seqlen) token ids, of which each rank takes its share; the loss is the mean over their predicted tokens,
    in nats. Of a piece from A to B, matrix k's part is <dL/dW_k at its middle, B_k - A_k>: integrated gradients
    (Sundararajan et al. 2017) by the midpoint rule, so that the parts sum to L(B) - L(A) but for the rule's error. The
    weights are left as they were found.
    """
    parts: dict[str, list[float]] = {matrix.name: [] for matrix in model.matrices}
    with kept(model):
        for low, high in itertools.pairwise(path):
            for matrix in model.matrices:
                matrix.write((low[matrix] + high[matrix]) / 2)
            changes = {matrix: high[matrix] - low[matrix] for matrix in model.matrices}
            for name, part in _products(model, changes, windows, batch_size).items():
                parts[name].append(part)
    return parts


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
