"""The loss's gradients with respect to the prunable weights, one parameter at a time."""

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from . import ranks
from .activations import Activations, Store
from .blocks import replaced_forward
from .blockwise import ENTRY, BlockwisePass
from .errors import RunError
from .model import PROBE_LENGTH, LanguageModel, Matrix
from .precision import choose_autocast, mixed_precision
from .progress import progress
from .route import Leaf

OVERWRITTEN = "modified by an inplace operation"  # how autograd calls what a gradient can no longer be taken of
T = TypeVar("T")
Visit = Callable[[Matrix, Tensor], None]
Given = Callable[[Leaf, int], Tensor | None]


def for_each_gradient(
    model: LanguageModel, windows: Tensor, visit: Visit, *, batch_size: int = 1, store: Store | None = None
) -> None:
    """Call `visit(matrix, gradient)`, (out, in), of every matrix that a batch's loss depends on, batch by batch.

    windows (n, seqlen) token ids, of which each rank takes its share; the loss is summed over their predicted tokens,
    in nats. No gradient outlives the call that it is handed to. A GPU takes one window a pass and keeps of each block
    its input only, from which the pass back computes it again. So it is of a streamed model, all windows block by
    block: forward, what each block gives being held in `store`, and then back.
    """
    check_differentiable(model)
    try:
        _visit_gradients(model, ranks.shard(windows), visit, batch_size, store)
    except RuntimeError as error:
        if OVERWRITTEN not in str(error):
            raise
        raise RunError(
            f"--model {model.name}: its blocks write into what they read, of which no gradient can be taken; leave out "
            "what takes gradients (_search, --fisher)"
        ) from error


def _visit_gradients(model: LanguageModel, shard: Tensor, visit: Visit, batch_size: int, store: Store | None) -> None:
    if model.device.type == "cuda":
        batch_size = 1
    if model.streamed:
        _block_by_block(model, shard, visit, batch_size, store)
        return
    passes, _ = _choose_autocast(model, lambda: model.hidden_states(shard[:1, :PROBE_LENGTH]))
    with ExitStack() as stack:
        stack.enter_context(_asked(model.matrices, visit))
        stack.enter_context(gradient_checkpointing(model))
        with progress(None, "gradients", "window", total=len(shard)) as bar:
            for batch in shard.split(batch_size):
                tokens = batch.to(model.device)
                with torch.enable_grad(), passes():
                    loss = _loss(model.forward_logits(tokens), tokens)
                loss.backward()
                bar.update(len(tokens))


def check_differentiable(model: LanguageModel) -> None:
    """Raises RunError for a streamed model a matrix of which is part of several blocks."""
    for matrix in model.matrices if model.streamed else ():
        if len({use.block for use in matrix.uses}) > 1:
            raise _used_again(model, matrix.name)


def _used_again(model: LanguageModel, what: str) -> RunError:
    return RunError(
        f"--stream: gradients are taken block by block, and {what} is used more than once on the way through "
        f"{model.name}; leave out --stream, or what takes gradients (_search, --fisher)"
    )


@contextmanager
def _asked(matrices: Iterable[Matrix], visit: Visit) -> Iterator[None]:
    """While passes back hand these matrices' gradients to `visit`."""
    readers: dict[torch.nn.Parameter, list[Matrix]] = {}
    for matrix in matrices:
        readers.setdefault(matrix.stored, []).append(matrix)

    def reached(parameter: torch.nn.Parameter) -> None:
        for matrix in readers[parameter]:
            visit(matrix, matrix.view(parameter.grad))
        parameter.grad = None

    with ExitStack() as stack:
        for parameter in readers:
            parameter.requires_grad_(True)
            stack.callback(parameter.requires_grad_, False)
            stack.callback(parameter.register_post_accumulate_grad_hook(reached).remove)
        yield


@contextmanager
def gradient_checkpointing(model: LanguageModel) -> Iterator[None]:
    """While passes forth and back go through the model: of each block a GPU keeps its input only, and computes it again
    on the way back.
    """
    with ExitStack() as stack:
        for block in model.blocks if model.device.type == "cuda" else ():
            again = functools.partial(checkpoint, block.forward, use_reentrant=False)
            stack.enter_context(replaced_forward(block, again))
        yield


def _choose_autocast(model: LanguageModel, first: Callable[[], T]) -> tuple[Callable[[], AbstractContextManager], T]:
    """In what precision passes are run, and what the `first` one gives.

    Raises RunError for a float16 model whose code bears no mixed precision: its gradients have no range without.
    """
    passes, found = choose_autocast(functools.partial(mixed_precision, model.model.dtype, model.device.type), first)
    if passes is nullcontext and model.model.dtype == torch.float16:
        raise RunError(f"--model {model.name}: its gradients have no range in float16; try --dtype bfloat16 or float32")
    return passes, found


def _loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Cross-entropy, summed, of logits (B, S, vocabulary) for the tokens (B, S) that follow."""
    targets = tokens[:, 1:].flatten().to(logits.device)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets, reduction="sum")


def _block_by_block(model: LanguageModel, windows: Tensor, visit: Visit, batch_size: int, store: Store | None) -> None:
    batch_size = min(batch_size, len(windows))
    passes, blockwise = _choose_autocast(model, lambda: BlockwisePass(model, windows, batch_size, store, keep=True))
    for block in blockwise.visits:
        if blockwise.visits.count(block) > 1:
            raise _used_again(model, model.block_names[block])
    visits, back = list(enumerate(blockwise.visits)), _Back(blockwise, passes)
    for number, block in progress(visits, "gradients, forward", "block"):
        with model.resident_block(block), passes():
            blockwise.advance(number)
    for batch in progress(range(len(blockwise)), "gradients, loss", "batch"):
        back.from_loss(batch)
    for number, block in progress(visits[::-1], "gradients, back", "block"):
        with model.resident_block(block), _asked(model.matrices_of(block), visit):
            for batch in range(len(blockwise)):
                back.through(number, batch)
        back.release(number)


class _Back:
    """The gradients with respect to what a blockwise pass has kept, from the loss backwards; `passes` gives the
    contexts of its passes.
    """

    def __init__(self, blockwise: BlockwisePass, passes: Callable[[], AbstractContextManager]):
        self._blockwise, self._passes = blockwise, passes
        self._gradients: dict[Leaf, Activations] = {}

    def from_loss(self, batch: int) -> None:
        model, route = self._blockwise.model, self._blockwise.route
        tokens = self._blockwise.batches[batch].to(model.device)

        def loss(given: Given) -> list[tuple[Tensor, Tensor | None]]:
            _, logits = route.calls(model, tokens, lambda leaf: given(leaf, batch), run=model.forward_logits)
            return [(_loss(logits, tokens), None)]

        self._take(batch, loss)

    def through(self, visit: int, batch: int) -> None:
        """Through one visit, computed again."""
        blockwise, block = self._blockwise, self._blockwise.block(visit)

        def outputs(given: Given) -> list[tuple[Tensor, Tensor | None]]:
            leaves = blockwise.route.call(visit, block, blockwise.arguments(visit, batch, given))
            wanted = [(value, self._gradients.get((visit, place))) for place, value in enumerate(leaves)]
            return [(value, held[batch]) for value, held in wanted if held is not None and batch < len(held)]

        self._take(batch, outputs)

    def release(self, visit: int) -> None:
        """Let go of what the visit gave and of its gradients: those before it do not read them."""
        self._gradients = {leaf: held for leaf, held in self._gradients.items() if leaf[0] != visit}
        self._blockwise.release(visit)

    def _take(self, batch: int, forward: Callable[[Given], list[tuple[Tensor, Tensor | None]]]) -> None:
        """The gradients of one batch from what `forward` returns, a gradient with each, to what it was given."""
        leaves: dict[Leaf, Tensor] = {}
        handed: dict[Leaf, Tensor] = {}

        def given(leaf: Leaf, batch: int) -> Tensor | None:
            value = self._blockwise.given(leaf, batch)
            if value is None or leaf == ENTRY or not value.is_floating_point():
                return value
            if leaf not in leaves:
                leaves[leaf] = value.detach().requires_grad_()
                # A view, as inside the whole graph: of a leaf autocast keeps one copy for all that read it, and adds up
                # their gradients in its half precision.
                handed[leaf] = leaves[leaf].view_as(value)
            return handed[leaf]

        with torch.enable_grad(), self._passes():
            pairs = [(value, gradient) for value, gradient in forward(given) if value.requires_grad]
        if pairs:
            torch.autograd.backward(*zip(*pairs, strict=True))
        for leaf, value in leaves.items():
            if value.grad is None:  # as of all but the last block's output, where the loss is computed
                continue
            held = self._gradients.setdefault(leaf, self._blockwise.hidden.new_empty())
            while len(held) < batch:  # of batches that did not depend on it
                held.put(len(held), torch.zeros_like(self._blockwise.given(leaf, len(held))))
            held.put(batch, value.grad if batch == len(held) else held[batch] + value.grad)
