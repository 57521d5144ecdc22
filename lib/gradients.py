"""The loss's gradients with respect to the prunable weights, one parameter at a time."""

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from . import ranks
from .blocks import replaced_forward
from .model import LanguageModel, Matrix
from .precision import mixed_precision
from .progress import progress


def visit_gradients(
    model: LanguageModel, windows: Tensor, visit: Callable[[Matrix, Tensor], None], *, batch_size: int = 1
) -> None:
    """Call `visit(matrix, gradient)`, (out, in), of every matrix that a batch's loss depends on, batch by batch.

    windows (n, seqlen) token ids, of which each rank takes its share; the loss is summed over their predicted tokens,
    in nats. No gradient outlives the call that it is handed to. A GPU takes one window a pass and keeps of each block
    its input only, from which the pass back computes it again.
    """
    readers: dict[torch.nn.Parameter, list[Matrix]] = {}
    for matrix in model.matrices:
        readers.setdefault(matrix.stored, []).append(matrix)

    def reached(parameter: torch.nn.Parameter) -> None:
        for matrix in readers[parameter]:
            visit(matrix, matrix.view(parameter.grad))
        parameter.grad = None

    mine = ranks.mine(windows)
    if model.device.type == "cuda":
        batch_size = 1
    with ExitStack() as stack:
        for parameter in readers:
            parameter.requires_grad_(True)
            stack.callback(parameter.requires_grad_, False)
            stack.callback(parameter.register_post_accumulate_grad_hook(reached).remove)
        stack.enter_context(frugal(model))
        with progress(None, "gradients", "window", total=len(mine)) as bar:
            for batch in mine.split(batch_size):
                tokens = batch.to(model.device)
                with torch.enable_grad(), mixed_precision(model.model.dtype, model.device.type):
                    logits = model.own_logits(tokens)[:, :-1]
                    targets = tokens[:, 1:].flatten().to(logits.device)
                    loss = F.cross_entropy(logits.flatten(0, 1).float(), targets, reduction="sum")
                loss.backward()
                bar.update(len(batch))


@contextmanager
def frugal(model: LanguageModel) -> Iterator[None]:
    """While passes forth and back go through the model: of each block a GPU keeps its input only, and computes it again
    on the way back.
    """
    with ExitStack() as stack:
        for block in model.blocks if model.device.type == "cuda" else ():
            again = functools.partial(checkpoint, block.forward, use_reentrant=False)
            stack.enter_context(replaced_forward(block, again))
        yield
