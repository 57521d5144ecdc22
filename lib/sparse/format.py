"""A matrix as its non-zero weights: a bit for each weight, and the values in order, in 16 bits."""

from dataclasses import dataclass, fields

import numpy
import torch
from torch import Tensor

WORD = 32  # weights to a word of the mask
SPARE = 64  # values behind the last, as kernels read whole vectors
KINDS = (torch.bfloat16, torch.float16)


class Form:
    """What holds a matrix without its zeros: a dataclass of tensors, and of `columns` and `kind`."""

    @classmethod
    def names(cls) -> list[str]:
        """Of the tensors, in order."""
        return [field.name for field in fields(cls) if field.type is Tensor]

    @property
    def tensors(self) -> list[Tensor]:
        return [getattr(self, name) for name in self.names()]

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def sparsity(self) -> float:
        """Of the matrix: some zeros may be held."""
        return 1 - int(self.values.view(torch.int16).count_nonzero()) / max(1, self.rows * self.columns)


@dataclass(frozen=True, eq=False)
class Packed(Form):
    """A matrix (rows, columns) with its zeros left out.

    masks    (rows, words) int32: bit b of word w is whether column 32 w + b is non-zero
    values   (non-zero weights + SPARE) int16: their bits in `kind`, row after row, in order of the columns
    offsets  (rows + 1) int64: where each row's values begin
    kind     bfloat16 or float16
    """

    masks: Tensor
    values: Tensor
    offsets: Tensor
    columns: int
    kind: torch.dtype

    @property
    def rows(self) -> int:
        return self.masks.shape[0]

    @property
    def words(self) -> int:
        return self.masks.shape[1]

    @property
    def sparsity(self) -> float:
        return 1 - (self.values.numel() - SPARE) / max(1, self.rows * self.columns)

    def dense(self) -> Tensor:
        """The matrix (rows, columns), in `kind`."""
        bits = torch.arange(WORD, dtype=torch.int32, device=self.masks.device)
        mask = (self.masks[:, :, None] >> bits & 1).bool().flatten(1)[:, : self.columns]
        found = torch.zeros(mask.shape, dtype=torch.int16, device=mask.device)
        return found.masked_scatter_(mask, self.values).view(self.kind)


def pack(weight: Tensor) -> Packed:
    """A matrix (rows, columns) without its zeros, on its own device. Values in 16 bits are kept as they are; others
    are rounded to the type of 16 bits that changes them less, which is none where one holds them exactly.
    """
    kind, mask, (rows, columns) = storage_kind(weight), weight.contiguous() != 0, weight.shape
    whole = torch.nn.functional.pad(mask, (0, -columns % WORD))
    bits = numpy.packbits(whole.numpy(force=True), axis=1, bitorder="little")
    masks = torch.from_numpy(bits.view("<i4").reshape(rows, -1).copy()).to(weight.device)
    offsets = torch.zeros(rows + 1, dtype=torch.int64, device=weight.device)
    torch.cumsum(mask.sum(1), 0, out=offsets[1:])
    values = torch.zeros(int(offsets[-1]) + SPARE, dtype=torch.int16, device=weight.device)
    values[:-SPARE] = weight[mask].to(kind).view(torch.int16)
    return Packed(masks, values, offsets, columns, kind)


def storage_kind(weight: Tensor) -> torch.dtype:
    """The weight's own type of 16 bits, or that which rounds the values with the smaller squared error; bfloat16 where
    both are exact.
    """
    if weight.dtype in KINDS:
        return weight.dtype
    finite = weight.isfinite()

    def error(kind: torch.dtype) -> float:
        return float(torch.where(finite, weight - weight.to(kind).to(weight.dtype), 0).square().sum())

    return min(KINDS, key=error)


def bytes_per_weight(sparsity: float) -> float:
    """What a packed weight takes on average."""
    return 2 * (1 - sparsity) + 1 / 8
