"""The GPU's kernel, in Triton; with TRITON_INTERPRET=1 in the environment it runs on the CPU, for tests."""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from .format import WORD, Packed

CHUNKS = (1, 2, 4)  # of 256 weights of a row in one turn; where there is a GPU, the fastest for a shape is taken


@triton.jit
def _ones(byte):
    """How many bits of a byte are set."""
    byte = byte - ((byte >> 1) & 0x55)
    byte = (byte & 0x33) + ((byte >> 2) & 0x33)
    return (byte + (byte >> 4)) & 0x0F


@triton.jit
def _add(total, bits, values, place, numbers, kind: tl.constexpr, WIDTH: tl.constexpr, PART: tl.constexpr):  # noqa: N803
    """total + the products of as many of a byte's weights as an int64 holds numbers; the next value's place."""
    for one in tl.static_range(64 // WIDTH):
        present = (bits & (1 << (64 // WIDTH * PART + one))) != 0
        weight = tl.load(values + place, mask=present, other=0.0)
        place += present
        number = numbers >> (WIDTH * one)
        number = number.to(tl.int16 if WIDTH == 16 else tl.int32).to(kind, bitcast=True)
        total += weight.to(tl.float32) * number.to(tl.float32)
    return total, place


@triton.jit
def _multiply(masks, values, offsets, x, out, rows, row_bytes, WIDTH: tl.constexpr, CHUNKS: tl.constexpr):  # noqa: N803
    """Two rows times one token. A lane of the warp has a byte of each row's mask: the values of its eight weights lie
    together, behind those of the lanes before it, and what it reads of x serves both rows.
    """
    kind: tl.constexpr = x.dtype.element_ty
    each: tl.constexpr = WIDTH // 8  # int64 of x to a byte of the mask
    lane, pair = tl.arange(0, 32), tl.arange(0, 2)
    one, token = 2 * tl.program_id(0), tl.program_id(1)
    two = tl.minimum(one + 1, rows - 1)
    one_mask, two_mask = masks + one.to(tl.int64) * row_bytes, masks + two.to(tl.int64) * row_bytes
    one_values, two_values = values + tl.load(offsets + one), values + tl.load(offsets + two)
    numbers = x.to(tl.pointer_type(tl.int64), bitcast=True) + token * row_bytes * each
    first, second = tl.zeros((32,), dtype=tl.float32), tl.zeros((32,), dtype=tl.float32)
    for begin in range(0, row_bytes, 32 * CHUNKS):
        for chunk in tl.static_range(CHUNKS):
            byte = begin + 32 * chunk + lane
            inside = byte < row_bytes
            one_bits = tl.load(one_mask + byte, mask=inside, other=0).to(tl.int32)
            two_bits = tl.load(two_mask + byte, mask=inside, other=0).to(tl.int32)
            one_count, two_count = _ones(one_bits), _ones(two_bits)
            counts = tl.cumsum(one_count + (two_count << 16), 0)  # 256 at most in each half
            one_place, two_place = (counts & 0xFFFF) - one_count, (counts >> 16) - two_count
            for part in tl.static_range(each // 2):
                several = numbers + byte[:, None] * each + 2 * part + pair[None, :]
                low, high = tl.split(tl.load(several, mask=inside[:, None], other=0))
                first, one_place = _add(first, one_bits, one_values, one_place, low, kind, WIDTH, 2 * part)
                second, two_place = _add(second, two_bits, two_values, two_place, low, kind, WIDTH, 2 * part)
                first, one_place = _add(first, one_bits, one_values, one_place, high, kind, WIDTH, 2 * part + 1)
                second, two_place = _add(second, two_bits, two_values, two_place, high, kind, WIDTH, 2 * part + 1)
            one_values += tl.sum(one_count, 0)
            two_values += tl.sum(two_count, 0)
    tl.store(out + token * rows + one, tl.sum(first, 0))
    tl.store(out + token * rows + two, tl.sum(second, 0))


if not knobs.runtime.interpret:
    _multiply = triton.autotune(
        [triton.Config({"CHUNKS": chunks}, num_warps=1) for chunks in CHUNKS], key=["rows", "row_bytes", "WIDTH"]
    )(_multiply)


def multiply(packed: Packed, x: Tensor) -> Tensor:
    """x (tokens, columns) times the matrix, transposed; (tokens, rows) in float32."""
    x = x.float() if x.element_size() > 4 else x
    missing = WORD * packed.words - packed.columns
    x = F.pad(x, (0, missing)) if missing else x.contiguous()
    x = x.clone() if x.data_ptr() % 16 else x  # it is read 16 bytes at a time
    out = torch.empty(x.shape[0], packed.rows, dtype=torch.float32, device=x.device)
    masks, values = packed.masks.view(torch.uint8), packed.values.view(packed.kind)
    chosen = {"CHUNKS": CHUNKS[1]} if knobs.runtime.interpret else {}
    with torch.cuda.device_of(x):
        _multiply[(triton.cdiv(packed.rows, 2), len(x))](
            masks, values, packed.offsets, x, out, packed.rows, masks.shape[1], WIDTH=8 * x.element_size(), **chosen
        )
    return out
