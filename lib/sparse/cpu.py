"""Products with packed matrices on the CPU, by masks or by columns."""

import ctypes
import functools
import threading

import torch
import torch.nn.functional as F
from torch import Tensor

from . import kernels, threads
from .format import WORD, Packed
from .indexed import Indexed

STRIP = 1 << 20  # weights of a matrix that are unpacked at a time, to stay in the caches
AT_ONCE = 8  # most tokens that share a pass over a row: as many as there are registers for
CHUNKS = 16  # parts of a matrix for each thread: one that is held up leaves them to the others

_TABLE = kernels.shuffles()
_Job = ctypes.c_int64 * kernels.FIELDS  # in the order of lib/sparse/kernels.py
_scratch = threading.local()


@functools.cache
def features() -> frozenset[str]:
    """What the processor has, by LLVM's names."""
    from llvmlite import binding

    return frozenset(name for name, has in binding.get_host_cpu_features().items() if has)


def variant_for(kind: torch.dtype) -> kernels.Variant:
    """The fastest that this processor can run on such values."""
    return _fastest(kind, features())


@functools.cache
def _fastest(kind: torch.dtype, has: frozenset[str]) -> kernels.Variant:
    return next(v for v in kernels.VARIANTS if kind in v.kinds and v.needs <= has)


def multiply(packed: Packed | Indexed, x: Tensor) -> Tensor:
    """x (tokens, columns) times the matrix, transposed; (tokens, rows) in float32.

    What an Indexed matrix leaves out is not multiplied: an infinity reaches the outputs that have a weight for it.
    """
    if isinstance(packed, Indexed):
        reads, width = torch.float32, packed.columns
        compiled = functools.partial(kernels.compiled_indexed_product, packed.kind, packed.blocks.itemsize)
    else:
        variant = variant_for(packed.kind)
        reads, width = variant.reads, packed.words * WORD
        compiled = functools.partial(kernels.compiled_product, variant, packed.kind)
    tokens, split = x.shape[0], reads == torch.bfloat16 and x.dtype != torch.bfloat16
    if split:  # in two parts of 8 bits each
        high = x.to(torch.bfloat16)
        low = torch.where(high.isfinite(), x.float() - high.float(), 0).to(torch.bfloat16)
        x = torch.cat([high, low])
    x, at_once = _padded(x.to(reads), width)
    out = torch.empty(x.shape[0], packed.rows)
    _run(compiled(at_once), packed, packed.rows, out, x)
    if split:
        return out[:tokens] + out[tokens : 2 * tokens]
    return out if out.shape[0] == tokens else out[:tokens]


def product(packed: Packed | Indexed, x: Tensor) -> Tensor:
    """The same for many tokens, in the dtype of x: strips of the matrix are unpacked, and multiplied as any are."""
    if isinstance(packed, Indexed):
        function, width = kernels.compiled_indexed_unpacking(packed.blocks.itemsize), packed.columns
    else:
        function, width = kernels.compiled_unpacking(variant_for(packed.kind), packed.kind), packed.words * WORD
    strip = max(1, min(packed.rows, STRIP // max(1, width)))
    unpacked, parts = _buffer(packed.kind, strip * width), []
    weights = unpacked if x.dtype == packed.kind else _buffer(x.dtype, strip * width)
    for first in range(0, packed.rows, strip):
        rows = min(strip, packed.rows - first)
        _run(function, packed, rows, unpacked, first=first)
        if weights is not unpacked:
            weights[: rows * width].copy_(unpacked[: rows * width])
        parts.append(F.linear(x, weights[: rows * width].view(rows, width)[:, : packed.columns]))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _padded(x: Tensor, width: int) -> tuple[Tensor, int]:
    """x with zeros behind, such that it has whole words and as many tokens as are taken at once, or a multiple."""
    at_once = min(AT_ONCE, 1 << (x.shape[0] - 1).bit_length())
    missing = width - x.shape[1], -x.shape[0] % at_once
    return (F.pad(x, (0, missing[0], 0, missing[1])) if any(missing) else x.contiguous()), at_once


def _buffer(dtype: torch.dtype, numbers: int) -> Tensor:
    """Memory of this thread that is used again and again: fresh pages would cost as much as the product."""
    found = _scratch.__dict__.get(dtype)
    if found is None or len(found) < numbers:
        with torch.inference_mode(False):  # whose tensors cannot be written to outside of it
            found = _scratch.__dict__[dtype] = torch.empty(numbers, dtype=dtype)
    return found


def _run(function, packed: Packed | Indexed, rows: int, out: Tensor, x: Tensor | None = None, first: int = 0) -> None:
    if isinstance(packed, Indexed):
        width, where, table = packed.columns, packed.places.data_ptr(), packed.blocks.data_ptr()
    else:
        width, where, table = packed.words, packed.masks.data_ptr(), _TABLE.ctypes.data
    chunk = max(2, rows // (CHUNKS * torch.get_num_threads()))
    tokens, x_address, x_bytes = (0, 0, 0) if x is None else (x.shape[0], x.data_ptr(), x.stride(0) * x.itemsize)
    job = _Job(
        0, rows, chunk, width, tokens, where, packed.values.data_ptr(), packed.offsets.data_ptr(), x_address,
        out.data_ptr(), table, first, x_bytes,
    )  # fmt: skip
    threads.run(function.address, ctypes.addressof(job))
