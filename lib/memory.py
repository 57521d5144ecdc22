"""How the process holds on to memory."""

import ctypes
import sys

import torch
from torch import Tensor

# glibc's names in malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8


def keep_freed_memory(tensors_up_to: int = 32 << 20) -> None:
    """Let the C library keep up to 1 GB of freed memory for the next tensor, and not ask the kernel for fresh pages.

    The loop over blocks frees and allocates the same activations thousands of times; fresh pages for each cost a
    fifth of its time (docs/LOG.md). Tensors above `tensors_up_to` bytes (at most 32 MiB) still go back at once: where
    weights come and go, keeping those would add up to a gigabyte. All threads share one heap, as each of those that
    read weights would keep what it once held in its own. Elsewhere than on glibc: nothing.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, tensors_up_to)
        mallopt(_M_TRIM_THRESHOLD, 1 << 30)
        mallopt(_M_ARENA_MAX, 1)


def return_freed_memory() -> None:
    """Give the kernel what the C library keeps: small objects that outlive the tensors between them leave gaps in which
    the next ones find no room. Elsewhere than on glibc: nothing.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform.startswith("linux") else None
    if trim is not None:
        trim(0)


def on_host(tensor: Tensor) -> Tensor:
    """A copy in the host's memory; of a GPU's tensor in pinned memory, 35 times as fast as in other (docs/GPU.md)."""
    return torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda).copy_(tensor)


def is_finite(tensor: Tensor) -> bool:
    """Whether it holds neither NaN nor infinity: by its extremes, which NaN is among, without a copy of it."""
    return not tensor.numel() or bool(torch.stack(tensor.aminmax()).isfinite().all())
