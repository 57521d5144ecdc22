"""SparseGPT (Frantar & Alistarh 2023, arXiv 2301.00774): pruning with optimal brain surgeon updates."""

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..graphs import captured
from ..masks import Pattern, lowest, lowest_of_columns, lowest_of_matrix
from ..stats import InputStats
from .base import mask_of, pruner
from .damping import damped

GROUP = 128  # columns whose mask is chosen together, and between which updates are applied lazily


def inverse_factor(stats: InputStats) -> tuple[Tensor, Tensor | None]:
    """The upper Cholesky factor U of (H + damping)^-1, H = 2 X^T X / tokens, U^T U = H^-1; and dead inputs.

    Returns U (in, in), float32, and a mask (in,) of the inputs that were always zero, None where there is none; these
    get H_jj = 1. With J the reversal of order and J H J = L L^T, U = J L^-1 J: one Cholesky and one triangular inverse.
    """
    diagonal = stats.gram.diagonal() * (2 / stats.tokens)
    dead = diagonal == 0
    diagonal[dead] = 1
    mean = diagonal.mean()

    def factorise(damping: float) -> tuple[Tensor]:
        reversed_hessian = stats.gram.flip(0, 1).mul_(2 / stats.tokens)
        reversed_hessian.diagonal().copy_((diagonal + damping * mean).flip(0))
        lower = torch.linalg.cholesky(reversed_hessian)
        del reversed_hessian  # each of these is as large as the Gram matrix, and it may be gigabytes
        identity = torch.eye(len(lower), device=lower.device, dtype=lower.dtype)
        inverse = torch.linalg.solve_triangular(lower, identity, upper=False)
        del lower, identity
        return (inverse.flip(0, 1),)

    return damped(stats, "Cholesky factorisation", factorise)[0], dead if dead.any() else None


def dead_first(weight: Tensor, dead: Tensor, sparsity: float, pattern: Pattern) -> Pattern:
    """The pattern with the weights of dead inputs (in,) among those that go in any case, as far as the sparsity asks
    for so many: the smallest first.
    """
    candidates = dead.expand_as(weight) if pattern.zeroed is None else dead | pattern.zeroed
    sizes = weight.abs().float().masked_fill(~candidates, torch.inf)
    return replace(pattern, zeroed=mask_of(sizes, sparsity, pattern, lowest_of_matrix) & candidates)


def counts_of_groups(size: int, rows: int, width: int, sparsity: float, zeroed: Tensor | None) -> list[int]:
    """Weights to remove from each `width` of the columns, so that the matrix meets its own sparsity.

    Each has its share, unless more of it are zeroed (in, out), or the later ones could then not be held to theirs.
    """
    begins = range(0, size, width)
    forced = [0] * len(begins)
    if zeroed is not None:
        forced = torch.stack([part.sum() for part in zeroed.split(width)]).tolist()
    later = sum(forced)
    total, removed, counts = max(round(sparsity * rows * size), later), 0, []
    for begin, least in zip(begins, forced, strict=True):
        later -= least
        share = round(sparsity * rows * min(begin + width, size)) - removed
        counts.append(max(least, min(share, total - removed - later)))
        removed += counts[-1]
    return counts


@pruner("sparsegpt", needs="gram")
def sparsegpt(weight: Tensor, stats: InputStats, sparsity: float, pattern: Pattern) -> Tensor:
    """Left to right over the columns: drop the weights of least W_ij^2 / U_jj^2, and let what stays to the
    right make up for each one's error.

    The mask is chosen for GROUP columns at a time over all rows (their count rounded so that the matrix
    meets its own sparsity), or N of every M as each M begins. Weights that are zero already go, and then those of
    inputs that were always zero.
    """
    factor, dead = stats.derive(inverse_factor)
    factor = factor.to(weight.device)
    columns = weight.t().float().contiguous()  # (in, out): a column of W is a contiguous row here
    if dead is not None:
        pattern = dead_first(weight, dead.to(weight.device), sparsity, pattern)
    zeroed = None if pattern.zeroed is None else pattern.zeroed.t().contiguous()  # (in, out)
    rows, size = weight.shape
    step = pattern.group or GROUP
    width = max(GROUP // step, 1) * step
    counts = counts_of_groups(size, rows, width, sparsity, zeroed)
    for begin in range(0, size, width):
        end = min(begin + width, size)
        part = columns[begin:end]  # (width, out), updated in place
        local = factor[begin:end, begin:end]
        here = None if zeroed is None else zeroed[begin:end]
        if pattern.group is None:
            scores = (part / local.diagonal()[:, None]).square_()
            if zeroed is not None:
                scores.masked_fill_(here, -torch.inf)
            mask = lowest(scores.view(1, -1), counts[begin // width]).view_as(part)
            errors = remove(part, local, mask)
        else:
            errors = remove(part, local, None, step, pattern.zeros(sparsity), here)
        columns[end:].addmm_(factor[begin:end, end:].t(), errors, alpha=-1)
    return columns.t().to(weight.dtype)


def remove(
    part: Tensor, factor: Tensor, mask: Tensor | None, step: int = 0, zeros: int = 0, zeroed: Tensor | None = None
) -> Tensor:
    """Remove weights from a group of columns, one column after the other, each making up for those before it.

    part (width, out) in place; factor (width, width) the group's part of U; mask (width, out) what to remove, or None:
    `zeros` of every `step` columns, chosen as these begin, with what is `zeroed` already. Returns (width, out)
    (w_j - q_j) / U_jj, q the pruned column. On a GPU all of it is one captured graph: launched one by one, its three
    kernels a column would take eight times as long (docs/gpu.md).
    """
    if not part.is_cuda:
        mask = torch.zeros_like(part, dtype=torch.bool) if mask is None else mask
        errors = torch.empty_like(part)
        _column_by_column(part, factor, mask, errors, zeroed, step, zeros)
        return errors
    own, run = _graph(part.device, *part.shape, step, zeros, zeroed is not None)
    for buffer, given in zip(own, (part, factor, mask, None, zeroed), strict=True):
        if given is not None:
            buffer.copy_(given)
    run()
    part.copy_(own.part)
    return own.errors


def _column_by_column(part, factor, mask, errors, zeroed, step, zeros) -> None:
    scale = factor.diagonal()[:, None]
    for j in range(len(part)):
        if step and j % step == 0:
            group = slice(j, j + step)
            scores = (part[group] / scale[group]).square_()  # (M, out)
            mask[group] = lowest_of_columns(scores, zeros, None if zeroed is None else zeroed[group])
        torch.mul(part[j], mask[j], out=errors[j]).div_(factor[j, j])
        part[j + 1 :].addr_(factor[j, j + 1 :], errors[j], alpha=-1)
    part.masked_fill_(mask, 0)


class _Buffers(NamedTuple):
    part: Tensor
    factor: Tensor
    mask: Tensor
    errors: Tensor
    zeroed: Tensor | None


@lru_cache(maxsize=8)  # shapes of a model's matrices
def _graph(
    device: torch.device, width: int, rows: int, step: int, zeros: int, some_zeroed: bool
) -> tuple[_Buffers, Callable[[], None]]:
    """Tensors and a function that does to them what `_column_by_column` does, captured once."""
    part, errors = torch.zeros(2, width, rows, device=device)
    mask, zeroed = torch.zeros(2, width, rows, dtype=torch.bool, device=device)
    own = _Buffers(part, torch.eye(width, device=device), mask, errors, zeroed if some_zeroed else None)
    return own, captured(lambda: _column_by_column(*own, step, zeros), device)
