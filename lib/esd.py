"""The empirical spectral density (ESD) of a weight matrix and power laws fitted to its tail.

Source: AlphaPruning (Lu et al., NeurIPS 2024, arXiv 2410.10912), section 3; the Hill estimator and the
Kolmogorov-Smirnov choice of the tail follow Clauset, Shalizi and Newman (2009) as in WeightWatcher.
Everything is float64: the small eigenvalues that set the histogram's range do not survive a float32 Gram.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


class DegenerateSpectrumError(ValueError):
    """The matrix has no spectrum that a power law could be fitted to (zero, rank one, orthogonal ...)."""


@dataclass(frozen=True)
class Fit:
    """A power law p(x) ~ x^-alpha for x >= xmin, and its Kolmogorov-Smirnov distance from the tail."""

    alpha: float
    xmin: float
    ks: float


class Spectrum:
    """One matrix (out, in) and what is derived from it, each at most once."""

    def __init__(self, weight: Tensor):
        self.weight = weight

    @cached_property
    def eigenvalues(self) -> Tensor:
        """Eigenvalues of the smaller Gram matrix, ascending, float64, (N,) with N at most min(out, in).

        Those below N * eps * largest cannot be told from zero in float64 and are left out: they come
        from rank deficiency (dead rows, pruned weights), and a power law has no place for a zero.
        """
        matrix = self.weight.double()
        gram = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
        eigenvalues = torch.linalg.eigvalsh(gram)
        floor = eigenvalues[-1] * len(eigenvalues) * torch.finfo(torch.float64).eps
        return eigenvalues[eigenvalues > floor].cpu()

    @cached_property
    def hill(self) -> Tensor:
        """alpha(i) = 1 + n / sum_{j>=i} ln(lam[j] / lam[i]), n = N - i, for every tail start i; (N,).

        Infinite where the tail is constant (as it always is for the last i).
        """
        logs = self.eigenvalues.log()
        count = torch.arange(len(logs), 0, -1, dtype=torch.float64)
        sums = logs.flip(0).cumsum(0).flip(0) - count * logs  # sum over the tail of ln(lam[j]/lam[i])
        return torch.where(sums > 0, 1 + count / sums, torch.inf)

    def ks_distances(self, candidates: Tensor) -> Tensor:
        """KS(i) = max_{j>=i} |1 - (lam[j]/lam[i])^(1-alpha(i)) - (j-i)/n| for each candidate i; (candidates,)."""
        logs, size = self.eigenvalues.log(), len(self.eigenvalues)
        index = torch.arange(size)
        distances = []
        for start in candidates.split(max(1, 2**22 // size)):  # 32 MiB of float64 at a time
            i = start[:, None]  # (c, 1) against (N,)
            model = 1 - torch.exp((logs - logs[i]) * (1 - self.hill[i]))
            gap = (model - (index - i) / (size - i)).abs_()
            distances.append(gap.masked_fill_(index < i, 0).amax(1))
        return torch.cat(distances)

    def best_fit(self, candidates: Tensor) -> Fit:
        """The candidate tail start with finite alpha > 1 and the smallest KS distance.

        candidates (c,) indices into the eigenvalues. Raises DegenerateSpectrumError where there is none.
        """
        hill = self.hill[candidates]
        candidates = candidates[(hill > 1) & hill.isfinite()]
        if not len(candidates):
            raise DegenerateSpectrumError("no power law can be fitted: the tail holds no distinct eigenvalues")
        distances = self.ks_distances(candidates)
        best = int(distances.argmin())
        i = int(candidates[best])
        return Fit(float(self.hill[i]), float(self.eigenvalues[i]), float(distances[best]))

    def starts(self, low: float = -torch.inf, high: float = torch.inf) -> Tensor:
        """Indices i <= N-2 of the tail starts with low <= lam[i] <= high."""
        inner = self.eigenvalues[:-1]
        return ((inner >= low) & (inner <= high)).nonzero()[:, 0]

    @cached_property
    def peak(self) -> float:
        """Left edge of the fullest of 100 equal bins of log10(eigenvalues), as an eigenvalue."""
        logs = self.eigenvalues.log10()
        if not len(logs) or logs[0] == logs[-1]:
            raise DegenerateSpectrumError("no histogram can be drawn: fewer than two distinct eigenvalues above zero")
        low, high = float(logs[0]), float(logs[-1])
        counts = torch.histc(logs, bins=100, min=low, max=high)
        return 10 ** (low + int(counts.argmax()) * (high - low) / 100)
