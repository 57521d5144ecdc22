"""Attribution of a change of the loss to the matrices that changed: integrated gradients over weights."""

from collections.abc import Callable

import torch
from torch import Tensor

from . import ranks
from .activations import Store
from .gradients import for_each_gradient
from .model import LanguageModel, Matrix


def attribute(
    model: LanguageModel,
    before: dict[Matrix, Tensor],
    windows: Tensor,
    *,
    batch_size: int = 1,
    store: Store | None = None,
    changed: Callable[[int], None] | None = None,
) -> dict[str, float]:
    """matrix name -> its part of the loss's change from the weights `before`, (out, in) each, to the model's own.

    windows (n, seqlen) token ids, of which each rank takes its share; the loss is the mean over their predicted tokens,
    in nats. Matrix k's part is <dL/dW_k half way, after_k - before_k>: integrated gradients (Sundararajan et al. 2017)
    by the midpoint rule, so that the parts sum to L(after) - L(before) but for the rule's error. `before` is emptied
    and the model left half way, so that one copy of its weights is held beside it and no more: for a streamed model in
    `store`, and `changed` is what `LanguageModel.restored` gives.
    """
    changes: dict[Matrix, Tensor] = {}
    for block in range(len(model.blocks)):
        with model.resident_block(block):
            for matrix in model.matrices_of(block):
                was, weight = before.pop(matrix).to(matrix.weight.device), matrix.weight
                change = weight - was
                changes[matrix] = store.copy(change) if store else change
                matrix.write((was + weight) / 2)
            if changed is not None:
                changed(block)
    found = {matrix: torch.zeros((), dtype=torch.float64) for matrix in model.matrices}
    predicted, here = windows.shape[0] * (windows.shape[1] - 1), {}

    def add(matrix: Matrix, gradient: Tensor) -> None:
        if matrix not in here:  # a streamed model's block stays for all windows, and its changes with it
            if model.streamed and any(other.block != matrix.block for other in here):
                here.clear()
            here[matrix] = changes[matrix].to(gradient.device)
            found[matrix] = found[matrix].to(gradient.device)
        found[matrix] += (gradient * here[matrix]).sum().double() / predicted

    for_each_gradient(model, windows, add, batch_size=batch_size, store=store)
    products = torch.stack([product.cpu() for product in found.values()])
    ranks.all_reduce(products)
    return dict(zip((matrix.name for matrix in found), products.tolist(), strict=True))
