"""A matrix as its non-zero weights, each with its distance from the one before: what a GPU multiplies by.

Sliced ELLPACK (SELL-C-sigma; Kreutzer et al., arXiv 1307.6209) of delta-encoded columns: lanes side by side walk along
rows that are as long, and the columns that they are at lie close together.
"""

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .format import Form, storage_kind

ROWS = 16  # of a slice
MOST_PARTS = 64  # of a row: with so many a slice has the 1024 lanes that a block of a GPU's threads may have
GROUP = 8  # weights that have a word of gaps together
FARTHEST = 15  # columns that 4 bits say; across a wider gap a zero is kept
STRIP = 1 << 22  # weights that are packed at a time: each that is kept takes some 150 bytes meanwhile
H100_LANES = 132 * 2048  # that it holds at once
# The share of a GPU's lanes that reads as fast as its memory gives; of an H100 (docs/gpu.md).
ENOUGH = 0.38


@dataclass(frozen=True, eq=False)
class Sliced(Form):
    """A matrix (rows, columns) with its zeros left out, but for those that bridge wide gaps or fill up groups.

    The rows are sorted by how many weights they have and cut into slices of ROWS. Each row is cut into parts, of which
    all in a slice have as many groups of GROUP weights; lane p * ROWS + r has part p of the slice's row r.

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

    def dense(self) -> Tensor:
        """The matrix (rows, columns), in `kind`."""
        tensors = [self.values, self.gaps, self.starts, self.offsets, self.order]  # as compilers can follow
        return _unpack(tensors, self.columns).view(self.kind)


@torch.library.custom_op("alphapruning::unpack", mutates_args=())
def _unpack(tensors: list[Tensor], columns: int) -> Tensor:
    """The matrix (rows, columns), int16. One operation to compilers."""
    if tensors[0].is_cuda:
        from .gpu_kernel import unpack  # Triton comes with torch's build for CUDA only

        return unpack(tensors, columns)
    words, gaps, starts, offsets, order = tensors
    groups, lanes = gaps.shape
    found = torch.zeros(len(order), columns, dtype=torch.int16, device=words.device)
    steps = torch.arange(GROUP, dtype=torch.int32, device=words.device)[None, :, None]
    gaps = (gaps[:, None] >> 4 * steps & FARTHEST).view(-1, lanes)  # (groups * GROUP, lanes), as the next
    values = words.view(torch.int16).view(groups, GROUP // 2, lanes, 2).transpose(2, 3).reshape(-1, lanes)
    for slice_, (begin, end) in enumerate(itertools.pairwise(offsets.mul(GROUP).tolist())):
        rows, reached = order[slice_ * ROWS :].long(), starts[slice_] + gaps[begin:end].cumsum(0)
        at, lane = values[begin:end].nonzero(as_tuple=True)
        found[rows[lane % ROWS], reached[at, lane]] = values[begin + at, lane]
    return found


@_unpack.register_fake
def _(tensors, columns):
    return tensors[0].new_empty(len(tensors[-1]), columns, dtype=torch.int16)


def pack_sliced(weight: Tensor) -> Sliced:
    """A matrix (rows, columns) without its zeros, on its own device; its values are rounded as `pack` rounds them."""
    kind, device, (rows, columns) = storage_kind(weight), weight.device, weight.shape
    strip = max(1, STRIP // max(1, columns) // ROWS) * ROWS
    lengths = torch.cat([_lengths(part) for part in weight.split(strip)])
    order = lengths.argsort(descending=True, stable=True)
    longest = lengths[order[::ROWS]]  # of each slice
    parts = _parts(longest, rows)
    groups, lanes = -(-longest // (parts * GROUP)), parts * ROWS
    offsets = torch.zeros(len(groups) + 1, dtype=torch.int64, device=device)
    torch.cumsum(groups, 0, out=offsets[1:])
    total = int(offsets[-1])
    values = torch.zeros(total, GROUP // 2, lanes, 2, dtype=torch.int16, device=device)
    gaps = torch.zeros(total, lanes, GROUP, dtype=torch.uint8, device=device)
    starts = torch.zeros(len(groups), lanes, dtype=torch.int32, device=device)
    for first, some in zip(range(0, rows, strip), order.split(strip), strict=True):
        entries = _Entries(weight[some], kind, lengths[some])
        slices, row = (entries.rows + first) // ROWS, entries.rows % ROWS
        part, at = _divided(entries.places, groups[slices] * GROUP)
        lane, (group, step) = part * ROWS + row, _divided(at, GROUP)
        group += offsets[slices]
        values[group, step // 2, lane, step % 2] = entries.values
        begins = at == 0
        gaps[group, lane, step] = entries.gaps.masked_fill(begins, 0).to(torch.uint8)
        starts[slices[begins], lane[begins]] = entries.columns[begins].int()
    words = (gaps[..., ::2] | gaps[..., 1::2] << 4).view(torch.int32)
    return Sliced(
        values.view(torch.int32).squeeze(3), words.squeeze(2), starts, offsets.int(), order.int(), columns, kind
    )


def _divided(number: Tensor, by: Tensor | int) -> tuple[Tensor, Tensor]:
    return number // by, number % by


def _parts(longest: Tensor, rows: int) -> int:
    """Of a row, where the longest of each slice has so many entries: a power of two.

    More parts have more lanes read at once, up to what the GPU holds, and more groups that are not full. The time is
    taken to be as what is read, and as 1 / lanes where they are few.
    """
    lanes, best = H100_LANES, (float("inf"), 1)
    if longest.is_cuda:
        properties = torch.cuda.get_device_properties(longest.device)
        lanes = properties.multi_processor_count * properties.max_threads_per_multi_processor
    for power in range(MOST_PARTS.bit_length()):
        parts = 1 << power
        if power and rows * parts > lanes:
            break
        groups = int((-(-longest // (parts * GROUP))).sum()) * parts
        best = min(best, (groups * math.hypot(1, ENOUGH * lanes / (rows * parts)), parts))
    return best[1]


def _weights(weight: Tensor) -> tuple[Tensor, ...]:
    """Of each weight, in order: its row, its column, its columns from the one before in the row, 0 where there is none,
    and how many zeros bridge these.
    """
    rows, columns = weight.nonzero(as_tuple=True)
    begins = rows.diff(prepend=rows.new_tensor([-1])) != 0
    gaps = columns.diff(prepend=columns.new_zeros(1)).masked_fill_(begins, 0)
    return rows, columns, gaps, (gaps - 1).clamp_(min=0) // FARTHEST


def _lengths(weight: Tensor) -> Tensor:
    """How many entries each row has."""
    rows, _, _, bridges = _weights(weight)
    return rows.new_zeros(len(weight)).index_add_(0, rows, bridges + 1)


class _Entries:
    """What is kept of some rows, of these `lengths`, in order: their weights, and zeros no further apart than a gap can
    say. Of each its row, its column, its bits, its columns from the one before in the row, and how many come before it
    there.
    """

    def __init__(self, weight: Tensor, kind: torch.dtype, lengths: Tensor):
        device, (rows, columns, gaps, bridges) = weight.device, _weights(weight)
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
        self.places = torch.arange(count, device=device) - (lengths.cumsum(0) - lengths)[self.rows]
