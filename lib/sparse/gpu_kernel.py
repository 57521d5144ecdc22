"""The GPU's kernel, in Triton; with TRITON_INTERPRET=1 in the environment it runs on the CPU, for tests."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from .format import Packed

# (rows, words of the mask, warps) of a program; where there is a GPU, the fastest for a shape is found at its first use
CONFIGURATIONS = [(1, 32, 4), (2, 16, 2), (4, 16, 4), (4, 32, 8), (8, 8, 4), (8, 16, 8)]


@triton.jit
def _multiply(
    masks,
    values,
    offsets,
    x,
    out,
    rows,
    columns,
    words,
    ROWS: tl.constexpr,  # noqa: N803
    WORDS: tl.constexpr,  # noqa: N803
):
    """A strip of rows times one token: mask words, the count of values before each weight, values, products."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(1)
    lane = tl.arange(0, WORDS * 32)
    inside = row < rows
    place = tl.load(offsets + row, mask=inside, other=0)
    total = tl.zeros((ROWS, WORDS * 32), dtype=tl.float32)
    for first in range(0, words, WORDS):
        word = first + lane // 32
        own = inside[:, None] & (word < words)[None, :]
        mask = tl.load(masks + row.to(tl.int64)[:, None] * words + word[None, :], mask=own, other=0)
        bit = (mask >> (lane % 32)[None, :]) & 1
        before = tl.cumsum(bit, axis=1) - bit
        weight = tl.load(values + place[:, None] + before, mask=bit != 0, other=0.0)
        column = first * 32 + lane
        number = tl.load(x + token * columns + column, mask=column < columns, other=0.0)
        total += weight.to(tl.float32) * number.to(tl.float32)[None, :]
        place += tl.sum(bit, axis=1)
    tl.store(out + token * rows + row, tl.sum(total, axis=1), mask=inside)


if not knobs.runtime.interpret:
    _multiply = triton.autotune(
        [triton.Config({"ROWS": rows, "WORDS": words}, num_warps=warps) for rows, words, warps in CONFIGURATIONS],
        key=["rows", "columns"],
    )(_multiply)


def multiply(packed: Packed, x: Tensor) -> Tensor:
    """x (tokens, columns) times the matrix, transposed; (tokens, rows) in float32."""
    x = x.contiguous()
    out = torch.empty(x.shape[0], packed.rows, dtype=torch.float32, device=x.device)
    given = (packed.masks, packed.values.view(packed.kind), packed.offsets, x, out)
    sizes = (packed.rows, packed.columns, packed.words)
    with torch.cuda.device_of(x):
        if knobs.runtime.interpret:
            rows, words, _ = CONFIGURATIONS[2]
            _multiply[(triton.cdiv(packed.rows, rows), len(x))](*given, *sizes, ROWS=rows, WORDS=words)
        else:
            _multiply[lambda chosen: (triton.cdiv(packed.rows, chosen["ROWS"]), len(x))](*given, *sizes)
    return out
