"""Products with packed matrices on the CPU."""

import functools
import threading

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor

from . import kernels, threads
from .format import WORD, Packed

STRIP = 4 << 20  # bytes of a matrix that are unpacked at a time, to stay in the caches
CHUNKS = 16  # parts of a matrix for each thread: one that is held up leaves them to the others

_TABLE = kernels.shuffles()
_scratch = threading.local()


@functools.cache
def features() -> frozenset[str]:
    """What the processor has, by LLVM's names."""
    from llvmlite import binding

    return frozenset(name for name, has in binding.get_host_cpu_features().items() if has)


def variant_for(kind: torch.dtype) -> kernels.Variant:
    """The fastest that this processor can run on such values."""
    return next(v for v in kernels.VARIANTS if kind in v.kinds and v.needs <= features())


def multiply(packed: Packed, x: Tensor) -> Tensor:
    """x (tokens, columns) times the matrix, transposed; (tokens, rows) in float32."""
    variant, tokens = variant_for(packed.kind), len(x)
    split = variant.reads == torch.bfloat16 and x.dtype != torch.bfloat16
    if split:  # in two parts of 8 bits each
        high = x.to(torch.bfloat16)
        low = torch.where(high.isfinite(), x.float() - high.float(), 0).to(torch.bfloat16)
        x = torch.cat([high, low])
    x = _whole_words(x.to(variant.reads), packed)
    out = torch.empty(len(x), packed.rows)
    function = kernels.compiled(variant, packed.kind)[0]
    _run(function, packed, packed.rows, out, {
        kernels.TOKENS: len(x), kernels.X: x.data_ptr(), kernels.X_BYTES: x.shape[1] * x.element_size(),
    })  # fmt: skip
    return out[:tokens] + out[tokens:] if split else out


def product(packed: Packed, x: Tensor) -> Tensor:
    """The same for many tokens, in the dtype of x: strips of the matrix are unpacked, and multiplied as any are."""
    function = kernels.compiled(variant_for(packed.kind), packed.kind)[1]
    width = packed.words * WORD
    strip = max(1, min(packed.rows, STRIP // (2 * width)))
    buffer = _buffer(strip * width)
    parts = []
    for first in range(0, packed.rows, strip):
        rows = min(strip, packed.rows - first)
        _run(function, packed, rows, buffer, {kernels.FIRST: first})
        weight = buffer[: rows * width].view(packed.kind).view(rows, width)[:, : packed.columns]
        parts.append(F.linear(x, weight.to(x.dtype)))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _whole_words(x: Tensor, packed: Packed) -> Tensor:
    missing = packed.words * WORD - packed.columns
    return F.pad(x, (0, missing)) if missing else x.contiguous()


def _buffer(numbers: int) -> Tensor:
    """Memory of this thread that is used again and again."""
    found = getattr(_scratch, "buffer", None)
    if found is None or len(found) < numbers:
        found = _scratch.buffer = torch.empty(numbers, dtype=torch.int16)
    return found


def _run(function, packed: Packed, rows: int, out: Tensor, more: dict[int, int]) -> None:
    job = numpy.zeros(kernels.FIELDS, dtype=numpy.int64)
    for field, value in {
        kernels.ROWS: rows, kernels.CHUNK: max(1, rows // (CHUNKS * torch.get_num_threads())),
        kernels.WORDS: packed.words, kernels.MASKS: packed.masks.data_ptr(), kernels.VALUES: packed.values.data_ptr(),
        kernels.OFFSETS: packed.offsets.data_ptr(), kernels.OUT: out.data_ptr(), kernels.TABLE: _TABLE.ctypes.data,
        **more,
    }.items():  # fmt: skip
        job[field] = value
    threads.run(function.address, job.ctypes.data)
