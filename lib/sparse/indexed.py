"""A matrix as its non-zero weights, each with its column: what a CPU multiplies by where few are left."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .format import Form, storage_kind

BLOCK = 256  # columns that a byte tells apart
QUAD = 4  # weights that lie together, in one block
STRIP = 1 << 24  # weights that are packed at a time: each takes some 30 bytes meanwhile


@dataclass(frozen=True, eq=False)
class Indexed(Form):
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
    (rows, columns), device = weight.shape, weight.device
    count = -(-columns // BLOCK)
    weight = torch.nn.functional.pad(weight, (0, count * BLOCK - columns)).view(rows, count, BLOCK)
    mask = weight != 0
    weights = mask.sum(2).flatten()  # (rows * blocks), as are the next two
    quads = (weights + QUAD - 1) // QUAD
    filled = QUAD * (quads.cumsum(0) - quads) - (weights.cumsum(0) - weights)  # so far
    found = weight[mask].to(kind).view(torch.int16)
    at = torch.arange(len(found), device=device) + filled.repeat_interleave(weights, output_size=len(found))
    values = torch.zeros(int(quads.sum()), QUAD, dtype=torch.int16, device=device)
    places = torch.zeros_like(values, dtype=torch.uint8)
    values.view(-1)[at] = found
    places.view(-1)[at] = torch.arange(BLOCK, device=device).to(torch.uint8).expand_as(mask)[mask]
    fills = torch.ones_like(values, dtype=torch.bool)
    fills.view(-1)[at] = False
    places = torch.where(fills, places[:, :1], places)  # no other column is read for a zero
    blocks = torch.arange(count, device=device).to(torch.uint8 if count <= 256 else torch.int32).repeat(rows)
    return values, places, blocks.repeat_interleave(quads, output_size=len(values)), quads.view(rows, count).sum(1)
