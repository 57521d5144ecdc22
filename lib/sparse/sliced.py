"""A matrix as its non-zero weights, each with its distance from the one before: what a GPU multiplies by.

Sliced ELLPACK (SELL-C-sigma; Kreutzer et al., arXiv 1307.6209) of delta-encoded columns: lanes side by side walk along
rows that are as long, and the columns that they are at lie close together.
"""

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from .format import Form, storage_kind

ROWS = 16  # of a slice
MOST_PARTS = 64  # of a row: with so many a slice has the 1024 lanes that a block of a GPU's threads may have
FEWEST = 16  # weights of a part
GROUP = 8  # weights that have a word of gaps together
FARTHEST = 15  # columns that 4 bits say; across a wider gap a zero is kept
STRIP = 1 << 22  # weights that are packed at a time: each takes some 100 bytes meanwhile
GPU_LANES = 132 * 2048  # that an H100 holds at once


@dataclass(frozen=True, eq=False)
class Sliced(Form):
    """A matrix (rows, columns) with its zeros left out, but for a few that bridge wide gaps or fill up groups.

    The rows are sorted by how many weights they have and cut into slices of ROWS. Each row is cut into parts with as
    many weights; lane p * ROWS + r of a slice has part p of its row r, in groups of GROUP weights.

    values   (groups, GROUP / 2, lanes) int32: the bits of two weights in `kind`, the first in the low half
    gaps     (groups, lanes) int32: four bits for each weight, the first in the lowest: its columns from the one before
    starts   (slices, lanes) int32: the column of each lane's first weight
    offsets  (slices + 1) int32: where each slice's groups begin
    order    (rows) int32: which row is where
    kind     bfloat16 or float16
    """

    values: Tensor
    gaps: Tensor
    starts: Tensor
    offsets: Tensor
    order: Tensor
    columns: int
    kind: torch.dtype

    @property
    def rows(self) -> int:
        return len(self.order)

    @property
    def sparsity(self) -> float:
        return 1 - int(self.values.view(torch.int16).count_nonzero()) / max(1, self.rows * self.columns)

    def dense(self) -> Tensor:
        """The matrix (rows, columns), in `kind`."""
        if self.values.is_cuda:
            from .gpu_kernel import unpack  # Triton comes with torch's build for CUDA only

            return unpack(self)
        device, (groups, lanes) = self.values.device, self.gaps.shape
        found = torch.zeros(self.rows, self.columns, dtype=torch.int16, device=device)
        steps = torch.arange(GROUP, device=device)[None, :, None]
        gaps = (self.gaps[:, None] >> 4 * steps & FARTHEST).view(-1, lanes)  # (groups * GROUP, lanes), as the next
        values = self.values.view(torch.int16).view(groups, GROUP // 2, lanes, 2).transpose(2, 3).reshape(-1, lanes)
        for slice_, (begin, end) in enumerate(itertools.pairwise(self.offsets.mul(GROUP).tolist())):
            rows, columns = self.order[slice_ * ROWS :].long(), self.starts[slice_] + gaps[begin:end].cumsum(0)
            at, lane = values[begin:end].nonzero(as_tuple=True)
            found[rows[lane % ROWS], columns[at, lane]] = values[begin + at, lane]
        return found.view(self.kind)


def pack_sliced(weight: Tensor) -> Sliced:
    """A matrix (rows, columns) without its zeros, on its own device; its values are rounded as `pack` rounds them."""
    kind, device, (rows, columns) = storage_kind(weight), weight.device, weight.shape
    strip = max(1, STRIP // max(1, columns) // ROWS) * ROWS
    lengths = torch.cat([_Entries(part, kind).lengths for part in weight.split(strip)])
    order = lengths.argsort(descending=True, stable=True)
    longest = lengths[order[::ROWS]]  # of each slice
    parts = _parts(rows, int(lengths.sum()) // max(1, rows), device)
    groups, lanes = -(-longest // (parts * GROUP)), parts * ROWS
    offsets = torch.zeros(len(groups) + 1, dtype=torch.int64, device=device)
    torch.cumsum(groups, 0, out=offsets[1:])
    total = int(offsets[-1])
    values = torch.zeros(total, GROUP // 2, lanes, 2, dtype=torch.int16, device=device)
    gaps = torch.zeros(total, lanes, GROUP, dtype=torch.uint8, device=device)
    starts = torch.zeros(len(groups), lanes, dtype=torch.int32, device=device)
    for first, some in zip(range(0, rows, strip), order.split(strip), strict=True):
        entries = _Entries(weight[some], kind)
        slices, row = (entries.rows + first) // ROWS, entries.rows % ROWS
        part, at = _divided(entries.places, groups[slices] * GROUP)
        lane, (group, step) = part * ROWS + row, _divided(at, GROUP)
        group += offsets[slices]
        values[group, step // 2, lane, step % 2] = entries.values
        gaps[group, lane, step] = entries.gaps.masked_fill(at == 0, 0).to(torch.uint8)
        begins = at == 0
        starts[slices[begins], lane[begins]] = entries.columns[begins].int()
    words = (gaps[..., ::2] | gaps[..., 1::2] << 4).view(torch.int32)
    return Sliced(
        values.view(torch.int32).squeeze(3), words.squeeze(2), starts, offsets.int(), order.int(), columns, kind
    )


def _divided(number: Tensor, by: Tensor | int) -> tuple[Tensor, Tensor]:
    return number // by, number % by


def _parts(rows: int, length: int, device: torch.device) -> int:
    """Of a row with `length` weights: so many that the GPU's lanes are busy, a power of two."""
    lanes, parts = GPU_LANES, 1
    if device.type == "cuda":
        lanes = 2048 * torch.cuda.get_device_properties(device).multi_processor_count
    while 2 * parts <= min(MOST_PARTS, lanes // max(1, rows), length // FEWEST):
        parts *= 2
    return parts


class _Entries:
    """What is kept of some rows, in order: their weights, and zeros no further apart than a gap can say.

    rows, columns, values, gaps, places  of each: its row, its column, its bits, the columns from the one before in its
    row, and the how manieth of the row it is
    lengths                              (rows) how many each row has
    """

    def __init__(self, weight: Tensor, kind: torch.dtype):
        device = weight.device
        rows, columns = weight.nonzero(as_tuple=True)
        begins = rows.diff(prepend=rows.new_tensor([-1])) != 0
        gaps = columns.diff(prepend=columns.new_zeros(1)).masked_fill_(begins, 0)
        bridges = (gaps - 1).clamp_(min=0) // FARTHEST  # zeros before each
        ends = (bridges + 1).cumsum(0)
        count = int(ends[-1]) if len(ends) else 0
        of = torch.arange(len(rows), device=device).repeat_interleave(bridges + 1, output_size=count)
        left = ends[of] - 1 - torch.arange(count, device=device)  # bridges that are still to come, and the weight
        own = left == 0
        self.rows = rows[of]
        self.values = torch.where(own, weight[rows, columns].to(kind).view(torch.int16)[of], 0)
        self.gaps = torch.where(own, gaps[of] - FARTHEST * bridges[of], FARTHEST)
        bridged = FARTHEST * (bridges[of] - left + 1)
        self.columns = columns[of] - torch.where(own, 0, gaps[of] - bridged)
        self.lengths = self.rows.bincount(minlength=len(weight))
        self.places = torch.arange(count, device=device) - (self.lengths.cumsum(0) - self.lengths)[self.rows]
