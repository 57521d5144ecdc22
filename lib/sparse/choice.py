"""Which matrices are worth holding without their zeros on this machine: measured, once for each shape."""

import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from .format import Packed
from .linear import multiply

LEAST = 0.3  # the sparsity below which nothing is tried: little memory is saved, and no time
MARGIN = 0.97  # of the dense product's time
TOKENS = (2, 4, 8, 16)  # at once, for which the kernel is tried against unpacking
NONE_AT_ONCE = 0

_known: dict[tuple, dict[float, int]] = {}  # shape and machine -> sparsity -> tokens at once; 0: dense is faster


def few_tokens(packed: Packed, weight: Tensor) -> int:
    """The most tokens at once for which the kernel is the faster way to multiply by the packed matrix; 0 where a
    single token is multiplied as fast by the dense one (rows, columns), which it is then better left as.

    What was measured for one matrix holds for others of its shape: where it paid it does at higher sparsities, where it
    did not it does not at lower ones.
    """
    key = (*weight.shape, weight.dtype, packed.kind, weight.device, torch.get_num_threads())
    sparsity, known = sparsity_of(packed), _known.setdefault(key, {})
    if lower := [(at, few) for at, few in known.items() if at <= sparsity and few]:
        return max(lower)[1]
    if any(at >= sparsity and not few for at, few in known.items()):
        return NONE_AT_ONCE
    known[sparsity] = _measured(packed, weight)
    return known[sparsity]


def sparsity_of(packed: Packed) -> float:
    return 1 - int(packed.offsets[-1]) / max(1, packed.rows * packed.columns)


def _measured(packed: Packed, weight: Tensor) -> int:
    x = torch.ones(max(TOKENS), packed.columns, dtype=weight.dtype, device=weight.device)
    dense, kernel = _alternating(lambda: F.linear(x[:1], weight), lambda: multiply(packed, x[:1], 1).to(x.dtype))
    if kernel > MARGIN * dense:
        return NONE_AT_ONCE
    few = 1
    for tokens in TOKENS:
        some = x[:tokens]
        kernel, unpacked = _alternating(lambda: multiply(packed, some, len(some)), lambda: multiply(packed, some, 0))  # noqa: B023
        if kernel > unpacked:
            break
        few = tokens
    return few


def _alternating(one: Callable, other: Callable, rounds: int = 5) -> tuple[float, float]:
    """The least seconds of each, called in turn with nothing in the caches, as a model's layers are."""
    cold = torch.empty(2 * _cache_bytes() // 4)
    fastest = [float("inf")] * 2
    for turn in range(rounds + 1):
        for which, function in enumerate((one, other)):
            cold.fill_(turn)
            _wait()
            begin = time.perf_counter()
            function()
            _wait()
            if turn:
                fastest[which] = min(fastest[which], time.perf_counter() - begin)
    return tuple(fastest)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _cache_bytes() -> int:
    """Of the processor's last cache, where Linux tells, up to 128 MB; else 32 MB."""
    try:
        size = Path("/sys/devices/system/cpu/cpu0/cache/index3/size").read_text().strip()
        return min(int(size.removesuffix("K")) << 10, 128 << 20)
    except (OSError, ValueError):
        return 32 << 20
