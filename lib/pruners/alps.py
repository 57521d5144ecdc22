"""ALPS: one-shot pruning by ADMM on the layer's least squares (Meng et al., NeurIPS 2024, arXiv 2406.07831)."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..masks import LowestOfMatrix, Pattern
from ..stats import InputStats
from .base import mask_of, pruner
from .damping import add_damping, damped

RHO = 0.1  # the first penalty, for a Gram matrix with a unit diagonal
EVERY, MOST = 3, 300  # iterations between changes of the penalty, and in all
# The penalty's growth by the share of support weights that changed since it last grew: the less, the slower.
GROWTH = ((0.10, 1.3), (0.0, 1.2))
STABLE = 0.01  # ADMM ends when no larger share changed
REFINEMENTS = 10  # conjugate gradient steps on the final support


def normalise(stats: InputStats) -> tuple[Tensor, ...]:
    """Scale D (in,), G = D^-1 (X^T X + ridge) D^-1 (in, in) with a unit diagonal; on a CPU its eigenvalues (in,) and
    eigenvectors (in, in) as well.

    One eigendecomposition serves (G + rho I)^-1 for every rho and every matrix that reads this input. A GPU takes as
    long for it as for ten inverses by Cholesky, which are more than a matrix has penalties (docs/gpu.md).
    """

    def factorise(ridge: float) -> tuple[Tensor, ...]:
        gram = add_damping(stats.gram, ridge)
        scale = gram.diagonal().sqrt()
        gram /= scale[:, None] * scale
        if gram.is_cuda:
            return scale, gram
        values, vectors = torch.linalg.eigh(gram)
        return scale, gram, values.clamp(min=0), vectors

    return damped(stats, "eigendecomposition", factorise)


@pruner("alps", needs="gram")
def alps(weight: Tensor, stats: InputStats, sparsity: float, pattern: Pattern) -> Tensor:
    """min tr((B - B_0) G (B - B_0)^T) over B with an exact number of zeros (in the matrix, or N of every M).

    ADMM (sections 3.1 and 3.2): B unconstrained, Z with the zeros, V the multiplier of B = Z; the penalty rho grows
    until the support stands still. On that support the weights are then refined by conjugate gradients.
    """
    scale, gram, *spectrum = (part.to(weight.device) for part in stats.derive(normalise))
    dense = weight.float() * scale  # B_0 (out, in), in units in which every input has the same size
    target = dense @ gram
    z, v, rho = dense, torch.zeros_like(dense), RHO
    lowest, before, removed = LowestOfMatrix(), None, None
    solve, info = _solver(gram, spectrum, rho, len(weight))
    for iteration in range(MOST):
        b = solve(torch.add(target, z, alpha=rho).sub_(v))
        z = torch.add(b, v, alpha=1 / rho)
        removed = mask_of(z.abs(), sparsity, pattern, lowest)
        z.masked_fill_(removed, 0)
        v.add_(b.sub_(z), alpha=rho)
        if iteration % EVERY == EVERY - 1:
            if before is not None:
                changed, support, failed = _counts(removed & ~before, ~removed, info)
                if failed:
                    raise torch.linalg.LinAlgError("the Cholesky decomposition of its input's Gram matrix fails")
                changed /= max(1, support)
                if changed <= STABLE:
                    break
                rho *= next(growth for share, growth in GROWTH if changed > share)
                solve, info = _solver(gram, spectrum, rho, len(weight))
            before = removed
    return (refine(z, dense, gram, ~removed) / scale).masked_fill(removed, 0).to(weight.dtype)


def _counts(*numbers: Tensor) -> list[int]:
    """The sum of each; a GPU is waited for once."""
    return torch.stack([each.sum() for each in numbers]).tolist()


def _solver(
    gram: Tensor, spectrum: Sequence[Tensor], rho: float, rows: int
) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """B -> B (G + rho I)^-1 for B (rows, in), and whether it failed, 0 where it did not, which nobody waits for.

    From the spectrum, where there is one, or a Cholesky factor; through the inverse where that is less work for EVERY
    products.
    """
    info = torch.zeros((), dtype=torch.int32, device=gram.device)
    if spectrum and len(gram) >= EVERY * rows:
        values, vectors = spectrum
        return (lambda right: (right @ vectors / (values + rho)) @ vectors.T), info
    if spectrum:
        values, vectors = spectrum
        inverse = (vectors / (values + rho)) @ vectors.T
    else:
        shifted = gram.clone()
        shifted.diagonal().add_(rho)
        factor, info = torch.linalg.cholesky_ex(shifted)
        if rows < len(gram):  # a factor solves for `in` columns to make the inverse
            return (lambda right: torch.cholesky_solve(right.T, factor).T), info
        inverse = torch.cholesky_inverse(factor)
    return (lambda right: right @ inverse), info


def refine(z: Tensor, dense: Tensor, gram: Tensor, support: Tensor) -> Tensor:
    """Conjugate gradients, row by row, on min tr((Z - B_0) G (Z - B_0)^T) with the support (a mask) of Z fixed."""
    residual = ((dense - z) @ gram) * support  # (out, in): minus half the gradient
    direction, size = residual, residual.square().sum(1, keepdim=True)
    for _ in range(REFINEMENTS):
        image = (direction @ gram) * support
        curvature = (direction * image).sum(1, keepdim=True)
        step = torch.where(curvature > 0, size / curvature, 0)
        z = z + step * direction
        residual = residual - step * image
        new = residual.square().sum(1, keepdim=True)
        direction = residual + torch.where(size > 0, new / size, 0) * direction
        size = new
    return z
