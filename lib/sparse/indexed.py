"""A matrix as its non-zero weights, each with its column: what a GPU multiplies by."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .format import storage_kind

BLOCK = 256  # columns that a byte tells apart
QUAD = 4  # weights that lie together, in one block
STRIP = 1 << 24  # weights that are packed at a time: each takes some 30 bytes meanwhile


@dataclass(frozen=True, eq=False)
class Indexed:
    """A matrix (rows, columns) with its zeros left out, but for those that fill the last quad of a row's block.

    values   (quads, QUAD) int16: their bits in `kind`, row after row, in order of the columns
    places   (quads, QUAD) uint8: their columns within the block
    blocks   (quads,) uint8, or int32 where there are more than 256: which block
    offsets  (rows + 1) int32: where each row's quads begin
    kind     bfloat16 or float16
    """

    values: Tensor
    places: Tensor
    blocks: Tensor
    offsets: Tensor
    columns: int
    kind: torch.dtype

    @property
    def rows(self) -> int:
        return len(self.offsets) - 1

    @property
    def bytes(self) -> int:
        return sum(part.nbytes for part in (self.values, self.places, self.blocks, self.offsets))

    @property
    def sparsity(self) -> float:
        return 1 - int(self.values.count_nonzero()) / max(1, self.rows * self.columns)

    def dense(self) -> Tensor:
        """The matrix (rows, columns), in `kind`."""
        quads = self.offsets.diff().long()
        begins = torch.arange(self.rows, device=quads.device).repeat_interleave(quads, output_size=len(self.blocks))
        at = (begins * self.columns + self.blocks.long() * BLOCK)[:, None] + self.places
        size = self.rows * self.columns
        found = torch.zeros(size + 1, dtype=torch.int16, device=quads.device)  # the last is for what fills a quad
        found.scatter_(0, at.masked_fill_(self.values == 0, size).flatten(), self.values.flatten())
        return found[:size].view(self.kind).view(self.rows, self.columns)


def pack_indexed(weight: Tensor) -> Indexed:
    """A matrix (rows, columns) without its zeros, on its own device; its values are rounded as `pack` rounds them."""
    kind, (rows, columns) = storage_kind(weight), weight.shape
    strip = max(1, STRIP // max(1, columns))
    values, places, blocks, quads = zip(*(_packed(part, kind) for part in weight.split(strip)), strict=True)
    offsets = torch.zeros(rows + 1, dtype=torch.int32, device=weight.device)
    torch.cumsum(torch.cat(quads), 0, dtype=torch.int32, out=offsets[1:])
    return Indexed(torch.cat(values), torch.cat(places), torch.cat(blocks), offsets, columns, kind)


def _packed(weight: Tensor, kind: torch.dtype) -> tuple[Tensor, ...]:
    """values, places and blocks of some rows, and the quads of each row."""
    rows, columns = weight.shape
    count = -(-columns // BLOCK)
    mask = torch.nn.functional.pad(weight != 0, (0, count * BLOCK - columns)).view(rows, count, BLOCK)
    quads = (mask.sum(2) + QUAD - 1) // QUAD  # (rows, blocks)
    begins = quads.flatten().cumsum(0).view_as(quads) - quads
    row, block, place = mask.nonzero(as_tuple=True)
    within = mask.cumsum(2, dtype=torch.int16)[row, block, place] - 1
    at = begins[row, block] * QUAD + within
    values = torch.zeros(int(quads.sum()), QUAD, dtype=torch.int16, device=weight.device)
    places = torch.zeros_like(values, dtype=torch.uint8)
    values.view(-1)[at] = weight[row, block * BLOCK + place].to(kind).view(torch.int16)
    places.view(-1)[at] = place.to(torch.uint8)
    of_rows = torch.arange(count, device=weight.device).repeat(rows)
    blocks = of_rows.repeat_interleave(quads.flatten(), output_size=len(values))
    return values, places, blocks.to(torch.uint8 if count <= 256 else torch.int32), quads.sum(1)
