"""Input statistics of a matrix over the calibration set: X^T X or its diagonal."""

from collections.abc import Callable

import torch
from torch import Tensor

# How much a pruner or metric wants to know of its input, from least to most.
NEEDS = ("nothing", "diagonal", "gram")


class InputStats:
    """Sums over the calibration tokens X (tokens, in) of one tensor, in float32.

    tokens       rows of X seen so far
    sum_squares  (in,)     diagonal of X^T X
    gram         (in, in)  X^T X, only where `needs` is "gram"; else None
    cross        (in, in)  X_d^T X, X_d what the dense model reads for the same tokens, only where asked for; else None
    paired       rows of X that came with their X_d
    residual     (out, in)  (R_d - R)^T X, R what the block adds the one reading matrix's output to, R_d the same in the
                 dense model; only of the matrix that writes a block's output (lib/blockwise.py); else None

    One object serves every matrix that reads the tensor, and so does all that is derived from it.
    """

    def __init__(self, needs: str, cross: bool = False):
        if needs not in NEEDS[1:]:
            raise ValueError(f"needs must be one of {NEEDS[1:]}, not {needs!r}")
        self.needs = needs
        self.tokens = 0
        self.sum_squares: Tensor | None = None
        self.gram: Tensor | None = None
        self.cross: Tensor | None = None
        self.residual: Tensor | None = None
        self.paired = 0
        self._wants_cross = cross
        self.events: list[str] = []  # retries and fallbacks met while using these statistics
        self._derived: dict[Callable, object] = {}

    @classmethod
    def empty(cls, needs: str, columns: int, device: torch.device, cross: bool = False) -> "InputStats":
        """The statistics of an input of that width before any token."""
        stats = cls(needs, cross)
        stats.add(torch.empty(0, columns, device=device))
        return stats

    def all_reduce(self, over_ranks: Callable[[Tensor], None]) -> None:
        """Replace every sum by `over_ranks` of it (in place)."""
        tokens = torch.tensor([self.tokens, self.paired], dtype=torch.float64)
        over_ranks(tokens)
        self.tokens, self.paired = map(int, tokens)
        over_ranks(self.sum_squares if self.gram is None else self.gram)
        for tensor in (self.cross, self.residual):
            if tensor is not None:
                over_ranks(tensor)

    def add(self, x: Tensor, dense: Tensor | None = None) -> None:
        """Add the tokens x (..., in), and what the dense model reads for them."""
        x = x.reshape(-1, x.shape[-1]).float()  # (tokens, in)
        self.tokens += x.shape[0]
        if self.needs == "gram":
            if self.gram is None:
                self.gram = x.new_zeros(x.shape[1], x.shape[1])
            add_gram(self.gram, x)
            self.sum_squares = self.gram.diagonal()
            if self._wants_cross:
                if self.cross is None:
                    self.cross = torch.zeros_like(self.gram)
                if dense is not None:
                    self.cross.addmm_(dense.reshape(x.shape).float().T, x)
                    self.paired += x.shape[0]
        else:
            if self.sum_squares is None:
                self.sum_squares = x.new_zeros(x.shape[1])
            self.sum_squares += x.square().sum(0)

    def merged(self, other: "InputStats") -> "InputStats":
        """The statistics over the tokens of both, each finished; neither may hold a residual."""
        both = InputStats(self.needs, self._wants_cross)
        both.tokens, both.paired = self.tokens + other.tokens, self.paired + other.paired
        if self.gram is None:
            both.sum_squares = self.sum_squares + other.sum_squares
            return both
        both.gram = self.gram + other.gram
        both.sum_squares = both.gram.diagonal()
        if self._wants_cross:
            both.cross = self.cross + other.cross
        return both

    def add_residual(self, gap: Tensor, x: Tensor) -> None:
        """Add R_d - R (..., out) for the tokens x (..., in)."""
        product = gap.reshape(-1, gap.shape[-1]).float().T @ x.reshape(-1, x.shape[-1]).float()
        self.residual = product if self.residual is None else self.residual.add_(product)

    def finish(self) -> None:
        """Call once all tokens are in: completes the symmetric matrix."""
        if self.gram is not None:
            symmetrize(self.gram)

    def summary(self) -> dict:
        """A summary for the journal."""
        return {"tokens": self.tokens, "sum_squares": float(self.sum_squares.sum())}

    def derive(self, function: Callable[["InputStats"], object]) -> object:
        """`function(self)`, computed once however many matrices ask for it."""
        if function not in self._derived:
            self._derived[function] = function(self)
        return self._derived[function]


def wanda_scores(weight: Tensor, stats: InputStats | None) -> Tensor:
    """|W_ij| * ||X_j||_2 (Wanda, arXiv 2306.11695, eq. 1), float32 (out, in); of an input that saw no token |W_ij|."""
    size = weight.abs().float()
    return size if stats is None else size * stats.sum_squares.sqrt().to(weight.device)


def add_gram(gram: Tensor, x: Tensor, blocks: int = 4) -> None:
    """gram += x^T x on the upper triangle, in column blocks: 5/8 of the full product's arithmetic.

    gram (in, in), x (tokens, in). What lies below the diagonal blocks is left alone.
    """
    width = max(256, -(-x.shape[1] // blocks))
    for begin in range(0, x.shape[1], width):
        end = min(begin + width, x.shape[1])
        gram[begin:end, begin:].addmm_(x[:, begin:end].T, x[:, begin:])


def symmetrize(gram: Tensor, blocks: int = 8) -> None:
    """Copy what lies above the diagonal of (in, in) below it, part by part: a whole copy of it may be gigabytes."""
    width = -(-len(gram) // blocks)
    for begin in range(0, len(gram), width):
        end = min(begin + width, len(gram))
        gram[end:, begin:end] = gram[begin:end, end:].T
        square = gram[begin:end, begin:end]
        square.copy_(square.triu() + square.triu(1).T)
