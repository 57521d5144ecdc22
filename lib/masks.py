"""Scores to boolean masks, True where a weight goes. Counts are exact, ties included."""

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import RunError


@dataclass(frozen=True)
class Pattern:
    """Where zeros may lie: anywhere (`group` is None), or a fixed number in every `group` (the M of
    N:M) consecutive weights along the input dimension. N follows from a matrix's own sparsity.
    """

    group: int | None = None

    @staticmethod
    def parse(text: str) -> tuple["Pattern", float | None]:
        """`unstructured` or `N:M` (N of every M removed) to the pattern and its ratio N/M.

        Raises RunError for anything else.
        """
        if text == "unstructured":
            return Pattern(), None
        match = re.fullmatch(r"(\d+):(\d+)", text)
        if not match:
            raise RunError(f"--sparsity_type: '{text}' is neither 'unstructured' nor N:M, such as 2:4 or 4:8")
        zeros, group = map(int, match.groups())
        if not 0 < zeros < group:
            raise RunError(
                f"--sparsity_type {text}: N of N:M must lie between 1 and M-1; N weights of every M are removed"
            )
        return Pattern(group), zeros / group

    def zeros(self, sparsity: float) -> int:
        """Zeros in each group of a matrix pruned to `sparsity`, a multiple of 1/M."""
        return round(sparsity * self.group)


def lowest(scores: Tensor, counts: int | Tensor) -> Tensor:
    """Mask of the `counts` lowest scores of each row; among equal scores the first ones.

    scores (rows, columns); counts one number, or (rows,) of them. Returns bool (rows, columns).
    """
    rows = len(scores)
    counts = torch.as_tensor(counts, device=scores.device).expand(rows)
    if rows == 0 or int(counts.max()) == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    if int(counts.min()) == int(counts.max()):
        limit = scores.kthvalue(int(counts[0]), dim=1).values[:, None]  # (rows, 1)
    else:
        ordered = scores.sort(dim=1).values
        limit = ordered.gather(1, (counts - 1).clamp(min=0)[:, None])
        limit = torch.where(counts[:, None] > 0, limit, -torch.inf)
    return _up_to(limit, scores, counts)


def _up_to(limit: Tensor, scores: Tensor, counts: Tensor) -> Tensor:
    """Mask of `counts` (rows,) scores of each row that are at most the row's limit (rows, 1), the counts-th lowest."""
    mask = scores <= limit
    if bool((mask.sum(1) == counts).all()):
        return mask
    ties = scores == limit
    mask &= ~ties
    missing = counts[:, None] - mask.sum(1, keepdim=True)  # (rows, 1)
    return mask | (ties & (ties.cumsum(1) <= missing))


def lowest_of_matrix(scores: Tensor, sparsity: float) -> Tensor:
    """Mask of the round(sparsity * size) lowest scores of the whole matrix."""
    return lowest(scores.reshape(1, -1), round(sparsity * scores.numel())).view_as(scores)


class LowestOfMatrix:
    """`lowest_of_matrix` again and again, for scores that change little from call to call.

    The limit is first looked for within NEAR of the last one, among few scores: a fourth of the time.
    """

    NEAR = 1.2

    def __init__(self):
        self._last: Tensor | None = None

    def __call__(self, scores: Tensor, sparsity: float) -> Tensor:
        flat, count = scores.reshape(1, -1), round(sparsity * scores.numel())
        if count == 0:
            return torch.zeros_like(scores, dtype=torch.bool)
        limit = None
        if self._last is not None:
            below = flat < self._last / self.NEAR
            near = flat[(flat <= self._last * self.NEAR) & ~below]
            rank = count - int(below.sum())
            limit = near.kthvalue(rank).values if 1 <= rank <= len(near) else None
        self._last = flat.kthvalue(count).values[0] if limit is None else limit
        counts = torch.tensor([count], device=scores.device)
        return _up_to(self._last.view(1, 1), flat, counts).view_as(scores)


def lowest_of_rows(scores: Tensor, sparsity: float) -> Tensor:
    """Mask of the lowest scores row by row, round(sparsity * size) in all.

    Every row loses floor(sparsity * columns), as in Wanda. What that leaves of the matrix's own target
    (less than one weight a row) is taken one weight a row, from the rows whose next score is lowest.
    """
    rows = len(scores)
    base, extra = divmod(round(sparsity * scores.numel()), rows)
    counts = torch.full((rows,), base, device=scores.device)
    if extra:
        following = scores.kthvalue(base + 1, dim=1).values  # (rows,)
        counts += lowest(following[None], extra)[0]
    return lowest(scores, counts)


def lowest_of_groups(scores: Tensor, zeros: int, group: int) -> Tensor:
    """Mask of the `zeros` lowest of every `group` consecutive scores of a row (N:M)."""
    return lowest(scores.reshape(-1, group), zeros).view_as(scores)
