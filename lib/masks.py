"""Scores to boolean masks, True where a weight goes. Counts are exact, ties included.

`zeroed` (a mask like the scores, or None) are weights that are zero already. They are pruned first, whatever
their scores, count towards what is asked for, and are taken even where they are more than that.
"""

import re
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .errors import RunError


@dataclass(frozen=True)
class Pattern:
    """Where zeros may lie: anywhere (`group` is None), or a fixed number in every `group` (the M of
    N:M) consecutive weights along the input dimension. N follows from a matrix's own sparsity.

    zeroed  (out, in) the weights of the one matrix to prune that stay zero because they are; None where there are none
    """

    group: int | None = None
    zeroed: Tensor | None = field(default=None, compare=False, repr=False)

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

    def on(self, weight: Tensor) -> "Pattern":
        """This pattern for one matrix (out, in), whose zeros stay zero."""
        zeroed = weight == 0
        return replace(self, zeroed=zeroed if zeroed.any() else None)

    def min_zeros(self, sparsity: float) -> int:
        """The least number of zeros after pruning to `sparsity`, given those that are there; 0 where none are."""
        if self.zeroed is None:
            return 0
        if self.group is None:
            return int(self.zeroed.sum())
        return int(_in_groups(self.zeroed, self.group).clamp(min=self.zeros(sparsity)).sum())


def lowest(scores: Tensor, counts: int | Tensor) -> Tensor:
    """Mask of the `counts` lowest scores of each row; among equal scores the first ones.

    scores (rows, columns); counts one number, or (rows,) of them. Returns bool (rows, columns).
    """
    if isinstance(counts, int):
        if len(scores) == 0 or counts == 0:
            return torch.zeros_like(scores, dtype=torch.bool)
        if not scores.is_cuda:
            return _up_to(scores.kthvalue(counts, dim=1).values[:, None], scores, counts)
        # A sort knows no wait, and kthvalue gives a whole matrix, as one row, to one multiprocessor (docs/gpu.md).
        return _up_to(scores.sort(dim=1).values[:, counts - 1, None], scores, counts)
    ordered = scores.sort(dim=1).values
    limit = ordered.gather(1, (counts - 1).clamp(min=0)[:, None])  # (rows, 1)
    return _up_to(torch.where(counts[:, None] > 0, limit, -torch.inf), scores, counts)


def _up_to(limit: Tensor, scores: Tensor, counts: int | Tensor) -> Tensor:
    """Mask of `counts` scores of each row that are at most the row's limit (rows, 1), the counts-th lowest."""
    mask = scores <= limit
    if not scores.is_cuda and bool((mask.sum(1) == counts).all()):  # what is left costs a GPU less than the wait
        return mask
    ties = scores == limit
    mask &= ~ties
    missing = (counts - mask.sum(1))[:, None]  # (rows, 1)
    return mask | (ties & (ties.cumsum(1, dtype=torch.int32) <= missing))


def _first(scores: Tensor, zeroed: Tensor | None) -> Tensor:
    """The scores, with -inf where a weight is zero already."""
    return scores if zeroed is None else scores.masked_fill(zeroed, -torch.inf)


def _count(scores: Tensor, sparsity: float, zeroed: Tensor | None) -> int:
    """Weights to take from the whole matrix."""
    count = round(sparsity * scores.numel())
    return count if zeroed is None else max(count, int(zeroed.sum()))


def lowest_of_matrix(scores: Tensor, sparsity: float, zeroed: Tensor | None = None) -> Tensor:
    """Mask of the round(sparsity * size) lowest scores of the whole matrix."""
    return lowest(_first(scores, zeroed).reshape(1, -1), _count(scores, sparsity, zeroed)).view_as(scores)


class LowestOfMatrix:
    """`lowest_of_matrix` again and again, for scores that change little from call to call.

    The limit is first looked for within NEAR of the last one, among few scores: a fourth of the time.
    """

    NEAR = 1.2

    def __init__(self):
        self._last: Tensor | None = None

    def __call__(self, scores: Tensor, sparsity: float, zeroed: Tensor | None = None) -> Tensor:
        if scores.is_cuda:  # a search would wait for the GPU, and a sort takes less
            return lowest_of_matrix(scores, sparsity, zeroed)
        flat, count = _first(scores, zeroed).reshape(1, -1), _count(scores, sparsity, zeroed)
        if count == 0:
            return torch.zeros_like(scores, dtype=torch.bool)
        limit = None
        if self._last is not None:
            below = flat < self._last / self.NEAR
            near = flat[(flat <= self._last * self.NEAR) & ~below]
            rank = count - int(below.sum())
            limit = near.kthvalue(rank).values if 1 <= rank <= len(near) else None
        self._last = flat.kthvalue(count).values[0] if limit is None else limit
        return _up_to(self._last.view(1, 1), flat, count).view_as(scores)


def lowest_of_rows(scores: Tensor, sparsity: float, zeroed: Tensor | None = None) -> Tensor:
    """Mask of the lowest scores row by row, round(sparsity * size) in all.

    Every row loses floor(sparsity * columns), as in Wanda. What that leaves of the matrix's own target
    (less than one weight a row) is taken one weight a row, from the rows whose next score is lowest.
    Where rows have more zeros already, the others lose as much less, all of them alike.
    """
    rows, total = len(scores), _count(scores, sparsity, zeroed)
    if zeroed is None:
        base, extra = divmod(total, rows)
        counts = torch.full((rows,), base, device=scores.device)
    else:
        scores, zeros = _first(scores, zeroed), zeroed.sum(1)  # (rows,)
        base, extra = _level(zeros, scores.shape[1], total)
        counts = zeros.clamp(min=base)
    if extra:
        following = scores.kthvalue(base + 1, dim=1).values  # (rows,); -inf of a row that has lost as much already
        counts = counts + lowest(following.masked_fill(following == -torch.inf, torch.inf)[None], extra)[0]
    elif zeroed is None:
        return lowest(scores, base)
    return lowest(scores, counts)


def _level(zeros: Tensor, columns: int, total: int) -> tuple[int, int]:
    """The largest `base` with sum(max(zeros, base)) <= total, and what is left of the total; zeros (rows,)."""
    levels = torch.arange(columns + 1, device=zeros.device)
    ordered = zeros.sort().values
    below = torch.searchsorted(ordered, levels, right=True)  # (columns + 1,) rows with at most so many zeros
    above = ordered.sum() - torch.cat([ordered.new_zeros(1), ordered.cumsum(0)])[below]
    sums = levels * below + above
    base = int((sums <= total).sum()) - 1
    return base, total - int(sums[base])


def lowest_of_groups(scores: Tensor, zeros: int, group: int, zeroed: Tensor | None = None) -> Tensor:
    """Mask of the `zeros` lowest of every `group` consecutive scores of a row (N:M)."""
    columns = scores.reshape(-1, group).t().contiguous()
    already = None if zeroed is None else zeroed.reshape(-1, group).t()
    return lowest_of_columns(columns, zeros, already).t().reshape(scores.shape)


def lowest_of_columns(scores: Tensor, zeros: int, zeroed: Tensor | None = None) -> Tensor:
    """Mask of the `zeros` lowest scores of each column of a few rows, (M, n): by counting those before each.

    Nothing is waited for, and on a CPU as on a GPU a selection takes longer.
    """
    scores, counts = _first(scores, zeroed), zeros if zeroed is None else zeroed.sum(0).clamp(min=zeros)
    mask = torch.empty_like(scores, dtype=torch.bool)
    for row, score in enumerate(scores):
        before = (scores[:row] <= score).sum(0) + (scores[row + 1 :] < score).sum(0)
        torch.lt(before, counts, out=mask[row])
    return mask


def _in_groups(zeroed: Tensor, group: int) -> Tensor:
    """How many of every `group` consecutive weights of a row are zeroed, (groups,)."""
    return zeroed.reshape(-1, group).sum(1)
