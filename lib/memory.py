"""Memory of the process: what malloc keeps, its peak, copies to the host."""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor

# glibc's names in malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8


def keep_freed_memory(tensors_up_to: int = 32 << 20) -> None:
    """Let the C library keep up to 1 GB of freed memory for the next tensor, and not ask the kernel for fresh pages.

    The loop over blocks frees and allocates the same activations thousands of times; fresh pages for each cost a
    fifth of its time (docs/log.md). Tensors above `tensors_up_to` bytes (at most 32 MiB) still go back at once: where
    weights come and go, keeping those would add up to a gigabyte. All threads share one heap, as each of those that
    read weights would keep what it once held in its own.
    """
    _mallopt(_M_MMAP_THRESHOLD, tensors_up_to)
    _mallopt(_M_TRIM_THRESHOLD, 1 << 30)
    _mallopt(_M_ARENA_MAX, 1)


@contextmanager
def eager_release() -> Iterator[None]:
    """While weights come and others take their place: what is freed of a tensor above 1 MB is the kernel's again at
    once, and leaves no holes between those that stay. They took as much again as a pruned model itself.
    """
    _mallopt(_M_MMAP_THRESHOLD, 1 << 20)
    try:
        yield
    finally:
        _mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # where glibc itself comes to after a while


def _mallopt(parameter: int, value: int) -> None:
    """Elsewhere than on glibc: nothing."""
    if sys.platform.startswith("linux") and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        mallopt(parameter, value)


def trim_heap() -> None:
    """Give the kernel what the C library keeps: small objects that outlive the tensors between them leave gaps in which
    the next ones find no room. Elsewhere than on glibc: nothing.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform.startswith("linux") else None
    if trim is not None:
        trim(0)


def forget_peak() -> None:
    """Let `resident_peak` begin anew, where the kernel lets it: on Linux, but not under every container."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def resident_peak() -> int | None:
    """Bytes of the largest resident set of this process since it began or `forget_peak`; None where Linux is not."""
    try:
        status = Path("/proc/self/status").read_text().partition("VmHWM:")[2]
        return int(status.split()[0]) << 10
    except (OSError, IndexError):
        return None


def copy_to_host(tensor: Tensor) -> Tensor:
    """A copy in the host's memory; of a GPU's tensor in pinned memory, 35 times as fast as in other (docs/gpu.md)."""
    return torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda).copy_(tensor)


def is_finite(tensor: Tensor) -> bool:
    """Whether it holds neither NaN nor infinity: by its extremes, which NaN is among, without a copy of it."""
    return not tensor.numel() or bool(torch.stack(tensor.aminmax()).isfinite().all())
