"""The GPU's kernel, in Triton; with TRITON_INTERPRET=1 in the environment it runs on the CPU, for tests."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .indexed import BLOCK, QUAD, Indexed

# Quads of a row in one step, two to a lane, and steps in one turn: on an H100 within 7 % of the fastest of fifteen
# choices for both sizes and all three sparsities that were tried (docs/gpu.md).
QUADS, STEPS = 64, 2
_BLOCK, _QUAD = tl.constexpr(BLOCK), tl.constexpr(QUAD)


@triton.jit
def _products(values, places, blocks, x, first, end, QUADS: tl.constexpr, WHOLE: tl.constexpr):  # noqa: N803
    """The products of QUADS quads; of those before `end`, unless the step is WHOLE. Lanes that lie side by side have
    weights that do, and so what they read of x lies in few lines of the cache.
    """
    at = first + tl.arange(0, QUADS)
    entry = at[:, None] * _QUAD + tl.arange(0, _QUAD)[None, :]
    if WHOLE:
        column = tl.load(blocks + at).to(tl.int32)[:, None] * _BLOCK + tl.load(places + entry)
        weight, number = tl.load(values + entry), tl.load(x + column)
    else:
        inside = at < end
        column = tl.load(blocks + at, mask=inside, other=0).to(tl.int32)[:, None] * _BLOCK
        column += tl.load(places + entry, mask=inside[:, None], other=0)
        weight = tl.load(values + entry, mask=inside[:, None], other=0.0)
        number = tl.load(x + column, mask=inside[:, None], other=0.0)
    return weight.to(tl.float32) * number.to(tl.float32)


@triton.jit
def _multiply(values, places, blocks, offsets, x, out, rows, columns, QUADS: tl.constexpr, STEPS: tl.constexpr):  # noqa: N803
    """A row times a token, by one warp."""
    row, token = tl.program_id(0), tl.program_id(1).to(tl.int64)
    x += token * columns
    total = tl.zeros((QUADS, _QUAD), dtype=tl.float32)
    begin, end = tl.load(offsets + row), tl.load(offsets + row + 1)
    whole = begin + (end - begin) // (QUADS * STEPS) * (QUADS * STEPS)
    for first in range(begin, whole, QUADS * STEPS):
        for step in tl.static_range(STEPS):
            total += _products(values, places, blocks, x, first + QUADS * step, end, QUADS, True)
    for first in range(whole, end, QUADS):
        total += _products(values, places, blocks, x, first, end, QUADS, False)
    tl.store(out + token * rows + row, tl.sum(tl.sum(total, 1), 0))


def multiply(packed: Indexed, x: Tensor) -> Tensor:
    """x (tokens, columns) times the matrix, transposed; (tokens, rows) in the dtype of x, or float32 for more.

    What is left out is not multiplied: an infinity reaches the outputs that have a weight for it.
    """
    x = (x.float() if x.element_size() > 4 else x).contiguous()
    out = torch.empty(x.shape[0], packed.rows, dtype=x.dtype, device=x.device)
    with torch.cuda.device_of(x):
        _multiply[(packed.rows, len(x))](
            packed.values.view(packed.kind), packed.places, packed.blocks, packed.offsets, x, out, packed.rows,
            packed.columns, QUADS, STEPS, num_warps=1,
        )  # fmt: skip
    return out
