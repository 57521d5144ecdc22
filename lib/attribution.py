"""Which matrix a change of the loss comes from, when all change at once: integrated gradients over weights."""

import itertools
from collections.abc import Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional as F

from . import ranks
from .model import LanguageModel, Matrix, kept
from .precision import mixed_precision
from .progress import progress

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
    mine = ranks.mine(windows)
    with _gradients(model, changes, found), progress(None, "gradients", "window", total=len(mine)) as bar:
        for batch in mine.split(batch_size):
            tokens = batch.to(model.device)
            with torch.enable_grad(), mixed_precision(model.model.dtype, model.device.type):
                logits = model.model(input_ids=tokens, use_cache=False).logits[:, :-1]
                targets = tokens[:, 1:].flatten().to(logits.device)
                loss = F.cross_entropy(logits.flatten(0, 1).float(), targets, reduction="sum") / predicted
            loss.backward()
            bar.update(len(batch))
    products = torch.tensor([*found.values()], dtype=torch.float64)
    ranks.add_up(products)
    return dict(zip(found, products.tolist(), strict=True))


@contextmanager
def _gradients(model: LanguageModel, changes: Weights, found: dict[str, float]):
    """While backward passes add each matrix's product to `found`; no gradient outlives the moment it is made."""
    readers: dict[torch.nn.Parameter, list[Matrix]] = {}
    for matrix in model.matrices:
        readers.setdefault(matrix.stored, []).append(matrix)

    def reached(parameter: torch.nn.Parameter) -> None:
        for matrix in readers[parameter]:
            found[matrix.name] += float((matrix.view(parameter.grad) * changes[matrix]).sum())
        parameter.grad = None

    hooks = []
    try:
        for parameter in readers:
            parameter.requires_grad_(True)
            hooks.append(parameter.register_post_accumulate_grad_hook(reached))
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for parameter in readers:
            parameter.requires_grad_(False)
