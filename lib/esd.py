"""The empirical spectral density (ESD) of a weight matrix and power laws fitted to its tail.

Source: AlphaPruning (Lu et al., NeurIPS 2024, arXiv 2410.10912), section 3; the Hill estimator and the
Kolmogorov-Smirnov choice of the tail follow Clauset, Shalizi and Newman (2009) as in WeightWatcher.
Everything is float64: the small eigenvalues that set the histogram's range do not survive a float32 Gram.
"""

from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from scipy.linalg import LinAlgError, eigvalsh
from scipy.linalg.blas import dsyrk
from torch import Tensor

from .errors import linalg_errors

SCIPY_UP_TO = 2560  # rows of a Gram matrix up to which scipy's LAPACK is faster than torch's (docs/log.md)
BINS = 100  # of the histogram of log10(eigenvalues), in alpha_peak's definition and in the pictures
COARSE_POINTS = 48  # of a tail, to reject candidates by; a few more or fewer change nothing but the time
EXACT_AT_ONCE = 32  # candidates whose distance is computed in full before looking again at the best so far


class DegenerateSpectrumError(ValueError):
    """The matrix has no spectrum that the metric is defined for (zero, rank one, orthogonal ...)."""


@dataclass(frozen=True)
class Fit:
    """A power law p(x) ~ x^-alpha for x >= lam_min, at Kolmogorov-Smirnov distance ks from the data."""

    alpha: float
    lam_min: float
    ks: float


def published_precision(weight: Tensor) -> Tensor:
    """The weights as the published estimator reads them: in float16.

    The histogram behind alpha_peak is sensitive to the last bits (two bins of nearly equal count), so this is
    part of the metrics' definition: it makes the published values reproduce, whatever --dtype is. Nothing is
    lost of a float16 checkpoint, nor of a bfloat16 one but what is below 6e-8. Weights beyond float16's range stay
    as they are, in float32.
    """
    half = weight.half()
    return half if half.isfinite().all() else weight.float()


@contextmanager
def cores_for_blas(shape: tuple[int, int]):
    """While a matrix is analysed whose linear algebra is scipy's: leave the cores to its threads.

    torch's, which go on spinning after each operation, would take turns with them at twice the time (docs/log.md).
    """
    threads = torch.get_num_threads()
    try:
        if min(shape) <= SCIPY_UP_TO:
            torch.set_num_threads(1)
        yield
    finally:
        torch.set_num_threads(threads)


def squared_singular_values(matrix: Tensor) -> Tensor:
    """Eigenvalues of the smaller Gram matrix of (out, in), ascending, float64, on the CPU; (min(out, in),).

    About n^2 m floating-point operations for the Gram matrix (a symmetric rank-k update) and 4/3 n^3 for the
    reduction to tridiagonal form, n <= m. Raises ValueError for NaN or infinity, and where LAPACK does not converge.
    """
    matrix = matrix.double().contiguous()
    wide = matrix.shape[0] <= matrix.shape[1]
    if matrix.device.type == "cpu":
        # BLAS sees the row-major matrix as its transpose, without a copy; one triangle is filled.
        gram = torch.from_numpy(dsyrk(1.0, matrix.numpy().T, trans=wide).T)
    else:
        gram = matrix @ matrix.T if wide else matrix.T @ matrix
    del matrix
    if not gram.diagonal().isfinite().all():  # a sum of squares over every row (or column)
        raise ValueError("holds NaN or infinity")
    try:
        if gram.device.type == "cpu" and len(gram) <= SCIPY_UP_TO:
            values = eigvalsh(gram.numpy().T, lower=False, driver="evd", overwrite_a=True, check_finite=False)
            return torch.from_numpy(values).clamp_(min=0)
        with linalg_errors():
            return torch.linalg.eigvalsh(gram, UPLO="L").clamp_(min=0).cpu()
    except (LinAlgError, torch.linalg.LinAlgError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"no eigenvalues ({reason}); try another --device, or prune without a metric") from error


class Spectrum:
    """One matrix (out, in) and what is derived from it, each at most once."""

    def __init__(self, weight: Tensor):
        self.weight = weight

    @classmethod
    def from_eigenvalues(cls, values: Tensor) -> "Spectrum":
        """A spectrum of given eigenvalues (N,), in any order: pooled ones, or drawn from a known law."""
        spectrum = cls(torch.empty(0, 0))
        spectrum.__dict__["values"] = values.double().sort().values
        return spectrum

    @cached_property
    def values(self) -> Tensor:
        """Eigenvalues of the smaller Gram matrix, ascending, zeros and all; (min(out, in),), float64, on the CPU."""
        return squared_singular_values(self.weight)

    @cached_property
    def eigenvalues(self) -> Tensor:
        """The eigenvalues above zero, ascending; (N,), float64, on the CPU.

        Those up to N * eps * largest cannot be told from zero in float64 and are left out: they come
        from rank deficiency (dead rows, pruned weights), and a power law has no place for a zero.
        """
        floor = self.values[-1:] * len(self.values) * torch.finfo(torch.float64).eps
        return self.values[self.values > floor]

    @property
    def largest(self) -> float:
        """The spectral norm squared. Raises DegenerateSpectrumError for a matrix of zeros."""
        if not len(self.eigenvalues):
            raise DegenerateSpectrumError("every weight is zero")
        return float(self.eigenvalues[-1])

    @cached_property
    def logs(self) -> Tensor:
        """Natural logarithms of the eigenvalues; (N,)."""
        return self.eigenvalues.log()

    @cached_property
    def hill(self) -> Tensor:
        """alpha(i) = 1 + n / sum_{j>=i} ln(lam[j]/lam[i]), n = N - i, for every tail start i; (N,).

        Infinite where the tail is constant (as it always is for the last i).
        """
        count = torch.arange(len(self.logs), 0, -1, dtype=torch.float64)
        sums = self.logs.flip(0).cumsum(0).flip(0) - count * self.logs  # over the tail, of ln(lam[j]/lam[i])
        return torch.where(sums > 0, 1 + count / sums, torch.inf)

    def ks_distances(self, candidates: Tensor, points: int | None = None) -> Tensor:
        """KS(i) = max_{j>=i} |1 - (lam[j]/lam[i])^(1-alpha(i)) - (j-i)/n| for each candidate i; (candidates,).

        With `points`, the maximum over that many j spread evenly over each tail: a lower bound of KS(i).
        """
        i, size = candidates[:, None], len(self.eigenvalues)  # (c, 1)
        if points is None:
            j = torch.arange(int(candidates.min()), size)  # (tail of the longest,)
        else:
            j = i + torch.arange(points) * (size - 1 - i) // max(1, points - 1)  # (c, points)
        model = 1 - torch.exp((self.logs[j] - self.logs[i]) * (1 - self.hill[i]))
        gap = model.sub_((j - i) / (size - i)).abs_()
        return gap.masked_fill_(j < i, 0).amax(1)

    def fit_at(self, i: int) -> Fit:
        """The fit to the tail that starts at index i. Raises DegenerateSpectrumError where it is constant or empty."""
        if not 0 <= i < len(self.eigenvalues) or not self.hill[i].isfinite():
            raise DegenerateSpectrumError("no power law can be fitted: the tail holds no distinct eigenvalues")
        distance = float(self.ks_distances(torch.tensor([i])))
        return Fit(float(self.hill[i]), float(self.eigenvalues[i]), distance)

    def best_fit(self, candidates: Tensor) -> Fit:
        """The candidate tail start with finite alpha > 1 and the smallest KS distance; of equals the first.

        candidates (c,) indices into the eigenvalues, ascending. Exact: only candidates whose lower bound exceeds a
        distance already found are left out. Raises DegenerateSpectrumError where there is none to choose from.
        """
        hill = self.hill[candidates]
        candidates = candidates[(hill > 1) & hill.isfinite()]
        if not len(candidates):
            raise DegenerateSpectrumError("no power law can be fitted: the tail holds no distinct eigenvalues")
        bounds = self.ks_distances(candidates, COARSE_POINTS)
        best, best_i = torch.inf, -1
        for group in bounds.argsort().split(EXACT_AT_ONCE):
            if bounds[group[0]] > best * (1 + 1e-9):  # a hair's breadth for exp's rounding
                break
            found = zip(self.ks_distances(candidates[group]).tolist(), candidates[group].tolist(), strict=True)
            best, best_i = min([*found, *([(best, best_i)] if best_i >= 0 else [])])
        return Fit(float(self.hill[best_i]), float(self.eigenvalues[best_i]), best)

    def starts(self, low: float = -torch.inf, high: float = torch.inf) -> Tensor:
        """Indices i <= N-2 of the tail starts with low <= lam[i] <= high."""
        inner = self.eigenvalues[:-1]
        return ((inner >= low) & (inner <= high)).nonzero()[:, 0]

    @cached_property
    def full_fit(self) -> Fit:
        """The best fit over every tail start."""
        return self.best_fit(self.starts())

    @cached_property
    def histogram(self) -> tuple[float, float, Tensor]:
        """log10 of the smallest and of the largest eigenvalue, and counts (BINS,) in equal bins between them."""
        logs = self.eigenvalues.log10()
        if not len(logs) or logs[0] == logs[-1]:
            raise DegenerateSpectrumError("no histogram can be drawn: fewer than two distinct eigenvalues above zero")
        low, high = float(logs[0]), float(logs[-1])
        return low, high, torch.histc(logs, bins=BINS, min=low, max=high)

    @property
    def peak(self) -> float:
        """Left edge of the histogram's fullest bin, as an eigenvalue."""
        low, high, counts = self.histogram
        return 10 ** (low + int(counts.argmax()) * (high - low) / BINS)
