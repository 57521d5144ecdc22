"""Which matrices are worth holding without their zeros on this machine: measured, once for each shape."""

import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from .linear import SparseLinear, multiply

LEAST = 0.3  # the sparsity below which nothing is tried: little memory is saved, and no time
MARGIN = 0.97  # of the dense product's time
TOKENS = (2, 4, 8, 16)  # at once, for which the kernel is tried against unpacking
NONE_AT_ONCE = 0
STEP = 0.05  # of sparsities that are told apart
FEWEST_TURNS, MOST_TURNS, CLEARLY = 4, 16, 1.2  # of a comparison

_known: dict[tuple, dict[float, int]] = {}  # shape and machine -> sparsity in steps -> tokens at once


def few_tokens(layer: SparseLinear, weight: Tensor) -> int:
    """The most tokens at once for which the kernel is the fastest way through the layer; 0 where a single token is
    multiplied as fast by the dense matrix (rows, columns), which it is then better left as.

    What was measured for one matrix holds for others of its shape: where it paid it does at higher sparsities, where it
    did not it does not at lower ones.
    """
    packed = layer.packed
    key = (*weight.shape, weight.dtype, packed.kind, weight.device, torch.get_num_threads())
    sparsity, known = round(packed.sparsity / STEP), _known.setdefault(key, {})
    if lower := [(at, few) for at, few in known.items() if at <= sparsity and few]:
        return max(lower)[1]
    if any(at >= sparsity and not few for at, few in known.items()):
        return NONE_AT_ONCE
    known[sparsity] = _measured(layer, weight)
    return known[sparsity]


@torch.no_grad()
def _measured(layer: SparseLinear, weight: Tensor) -> int:
    x = torch.ones(max(TOKENS), layer.in_features, dtype=weight.dtype, device=weight.device)
    dense, kernel = _alternating(lambda: F.linear(x[:1], weight, layer.bias), lambda: layer(x[:1]))
    if kernel > MARGIN * dense:
        return NONE_AT_ONCE
    few, packed = 1, layer.packed
    for tokens in TOKENS:
        some = x[:tokens]
        kernel, unpacked = _alternating(lambda: multiply(packed, some, tokens), lambda: multiply(packed, some, 0))  # noqa: B023
        if kernel > unpacked:
            break
        few = tokens
    return few


def _alternating(one: Callable, other: Callable) -> tuple[float, float]:
    """The least seconds of each, called in turn with nothing in the caches, as a model's layers are; so often that it
    is clear which is faster, or that it cannot matter.
    """
    cold = torch.empty(2 * _cache_bytes() // 4)
    clock = time.perf_counter if torch.cuda.is_available() or torch.get_num_threads() > 1 else time.thread_time
    fastest = [float("inf")] * 2
    for turn in range(MOST_TURNS):
        for which, function in enumerate((one, other)):
            cold.fill_(turn)
            _wait()
            begin = clock()
            function()
            _wait()
            if turn:  # the first compiles
                fastest[which] = min(fastest[which], clock() - begin)
        if turn >= FEWEST_TURNS and not 1 / CLEARLY < fastest[0] / fastest[1] < CLEARLY:
            break
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
