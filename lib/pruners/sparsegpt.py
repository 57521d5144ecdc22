"""SparseGPT (Frantar & Alistarh 2023, arXiv 2301.00774): pruning with optimal brain surgeon updates."""

import torch
from torch import Tensor

from ..errors import RunError
from ..masks import Pattern, lowest_of_groups, lowest_of_matrix
from ..stats import InputStats
from .base import pruner

GROUP = 128  # columns whose mask is chosen together, and between which updates are applied lazily
DAMPING = 0.01  # of the mean diagonal
RETRIES = 3


def inverse_factor(stats: InputStats) -> tuple[Tensor, Tensor]:
    """The upper Cholesky factor U of (H + damping)^-1, H = 2 X^T X / tokens, U^T U = H^-1; and dead inputs.

    Returns U (in, in), float32, and a mask (in,) of the inputs that were always zero; these get H_jj = 1.
    With J the reversal of order and J H J = L L^T, U = J L^-1 J: one Cholesky and one triangular inverse.
    A Cholesky that fails is tried again with ten times the damping, RETRIES times, each noted in `stats.events`.
    """
    diagonal = stats.gram.diagonal() * (2 / stats.tokens)
    dead = diagonal == 0
    diagonal[dead] = 1
    mean = diagonal.mean()
    for attempt in range(RETRIES + 1):
        damping = DAMPING * 10**attempt
        reversed_hessian = stats.gram.flip(0, 1).mul_(2 / stats.tokens)
        reversed_hessian.diagonal().copy_((diagonal + damping * mean).flip(0))
        lower, info = torch.linalg.cholesky_ex(reversed_hessian)
        del reversed_hessian  # each of these is as large as the Gram matrix, and it may be gigabytes
        if info == 0 and lower.isfinite().all():
            identity = torch.eye(len(lower), device=lower.device, dtype=lower.dtype)
            inverse = torch.linalg.solve_triangular(lower, identity, upper=False)
            del lower, identity
            return inverse.flip(0, 1), dead
        stats.events.append(f"Cholesky failed with damping {damping:g} of the mean diagonal")
    raise RunError(
        f"the Hessian is not positive definite even with damping {damping:g} of its mean diagonal; "
        "give more calibration data (--nsamples) or prune with wanda"
    )


@pruner("sparsegpt", needs="gram")
def sparsegpt(weight: Tensor, stats: InputStats, sparsity: float, pattern: Pattern) -> Tensor:
    """Left to right over the columns: drop the weights of least W_ij^2 / U_jj^2, and let what stays to the
    right make up for each one's error.

    The mask is chosen for GROUP columns at a time over all rows (their count rounded so that the matrix
    meets its own sparsity), or N of every M as each M begins.
    """
    factor, dead = stats.derive(inverse_factor)
    factor = factor.to(weight.device)
    columns = weight.t().float().contiguous()  # (in, out): a column of W is a contiguous row here
    columns[dead.to(weight.device)] = 0
    rows, size = weight.shape
    step = pattern.group or GROUP
    width = max(GROUP // step, 1) * step
    removed = 0
    for begin in range(0, size, width):
        end = min(begin + width, size)
        part = columns[begin:end]  # (width, out), updated in place
        local = factor[begin:end, begin:end]
        scale = local.diagonal()[:, None]
        errors = torch.empty_like(part)
        mask = torch.zeros_like(part, dtype=torch.bool)
        if pattern.group is None:
            count = round(sparsity * rows * end) - removed
            removed += count
            mask = lowest_of_matrix((part / scale).square_(), count / part.numel())
        for j in range(end - begin):
            if pattern.group is not None and j % step == 0:
                group = (part[j : j + step] / scale[j : j + step]).square_()  # (M, out)
                mask[j : j + step] = lowest_of_groups(group.t().contiguous(), pattern.zeros(sparsity), step).t()
            error = (part[j] * mask[j]).div_(local[j, j])  # (w_j - q_j) / U_jj, q the pruned column
            errors[j] = error
            part[j + 1 :].addr_(local[j, j + 1 :], error, alpha=-1)
            part[j].masked_fill_(mask[j], 0)
        columns[end:].addmm_(factor[begin:end, end:].t(), errors, alpha=-1)
    return columns.t().to(weight.dtype)
