"""The GPU's kernels, in Triton; with TRITON_INTERPRET=1 in the environment they run on the CPU, for tests."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .sliced import FARTHEST, GROUP, ROWS, Sliced

STEPS = 2  # groups in one turn: with as many lanes as a GPU holds 1 to 4 are as fast (docs/gpu.md)
WARP = 32
_ROWS, _PAIRS, _FARTHEST = tl.constexpr(ROWS), tl.constexpr(GROUP // 2), tl.constexpr(FARTHEST)


@triton.jit
def _first(word, IS_BFLOAT16: tl.constexpr):  # noqa: N803
    """The weight in a word's low half, as float32."""
    if IS_BFLOAT16:
        return (word << 16).to(tl.float32, bitcast=True)
    return word.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _second(word, IS_BFLOAT16: tl.constexpr):  # noqa: N803
    """The weight in its high half."""
    if IS_BFLOAT16:
        return (word & -65536).to(tl.float32, bitcast=True)
    return (word >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _begin(values, gaps, starts, offsets, LANES: tl.constexpr):  # noqa: N803
    """Where the lanes of this program's slice begin: values, gaps and columns; and how many groups they have."""
    index, lane = tl.program_id(0), tl.arange(0, LANES)
    first = tl.load(offsets + index)
    values += first.to(tl.int64) * (_PAIRS * LANES) + lane
    gaps += first.to(tl.int64) * LANES + lane
    return values, gaps, tl.load(starts + index * LANES + lane), tl.load(offsets + index + 1) - first


@triton.jit
def _group(values, gaps, x, column, total, LANES: tl.constexpr, IS_BFLOAT16: tl.constexpr):  # noqa: N803
    """Each lane's column and sum after a group."""
    gap = tl.load(gaps)
    for pair in tl.static_range(_PAIRS):
        word = tl.load(values + pair * LANES)
        column += (gap >> (8 * pair)) & _FARTHEST
        total += _first(word, IS_BFLOAT16) * tl.load(x + column).to(tl.float32)
        column += (gap >> (8 * pair + 4)) & _FARTHEST
        total += _second(word, IS_BFLOAT16) * tl.load(x + column).to(tl.float32)
    return column, total


@triton.jit
def _multiply(
    values, gaps, starts, offsets, order, x, out, rows, columns,
    PARTS: tl.constexpr, STEPS: tl.constexpr, IS_BFLOAT16: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """A slice's rows times a token. The lanes of a warp read of x what lies in few lines of the cache."""
    token = tl.program_id(1).to(tl.int64)
    x += token * columns
    lanes: tl.constexpr = PARTS * _ROWS
    values, gaps, column, count = _begin(values, gaps, starts, offsets, lanes)
    total = tl.zeros((lanes,), dtype=tl.float32)
    whole = count // STEPS * STEPS
    for _ in range(0, whole, STEPS):
        for step in tl.static_range(STEPS):
            own = values + step * (_PAIRS * lanes)
            column, total = _group(own, gaps + step * lanes, x, column, total, lanes, IS_BFLOAT16)
        gaps += STEPS * lanes
        values += STEPS * _PAIRS * lanes
    for _ in range(whole, count):
        column, total = _group(values, gaps, x, column, total, lanes, IS_BFLOAT16)
        gaps += lanes
        values += _PAIRS * lanes
    at = tl.program_id(0) * _ROWS + tl.arange(0, _ROWS)
    row = tl.load(order + at, mask=at < rows, other=0)
    tl.store(out + token * rows + row, tl.sum(tl.reshape(total, (PARTS, _ROWS)), 0), mask=at < rows)


@triton.jit
def _unpack(values, gaps, starts, offsets, order, out, rows, columns, PARTS: tl.constexpr):  # noqa: N803
    """A slice's rows into out (rows, columns), int16, which is zero."""
    lanes: tl.constexpr = PARTS * _ROWS
    values, gaps, column, count = _begin(values, gaps, starts, offsets, lanes)
    at = tl.program_id(0) * _ROWS + tl.arange(0, lanes) % _ROWS
    out += tl.load(order + at, mask=at < rows, other=0).to(tl.int64) * columns
    for _ in range(count):
        gap = tl.load(gaps)
        for pair in tl.static_range(_PAIRS):
            word = tl.load(values + pair * lanes)
            for half in tl.static_range(2):
                column += (gap >> (8 * pair + 4 * half)) & _FARTHEST
                value = (word >> (16 * half)).to(tl.int16)
                tl.store(out + column, value, mask=value != 0)  # what fills a group may be where a weight is
        gaps += lanes
        values += _PAIRS * lanes


def multiply(packed: Sliced, x: Tensor) -> Tensor:
    """x (tokens, columns) times the matrix, transposed; (tokens, rows) in the dtype of x, or float32 for more.

    Of the zeros few are multiplied: an infinity reaches the outputs that have a weight for it, and may reach others; in
    a dense product it reaches all.
    """
    x = (x.float() if x.element_size() > 4 else x).contiguous()
    out = torch.empty(x.shape[0], packed.rows, dtype=x.dtype, device=x.device)
    parts = packed.starts.shape[1] // ROWS
    with torch.cuda.device_of(x):
        _multiply[(len(packed.starts), len(x))](
            *packed.tensors, x, out, packed.rows, packed.columns, parts, STEPS, packed.kind == torch.bfloat16,
            num_warps=_warps(parts),
        )  # fmt: skip
    return out


def unpack(tensors: list[Tensor], columns: int) -> Tensor:
    """The matrix (rows, columns), int16, of a Sliced one's tensors."""
    _, _, starts, _, order = tensors
    out = torch.zeros(len(order), columns, dtype=torch.int16, device=order.device)
    parts = starts.shape[1] // ROWS
    with torch.cuda.device_of(out):
        _unpack[(len(starts),)](*tensors, out, *out.shape, parts, num_warps=_warps(parts))
    return out


def _warps(parts: int) -> int:
    return max(1, parts * ROWS // WARP)
