"""How the process holds on to memory."""

import ctypes
import sys

# glibc's names in malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def keep_freed_memory() -> None:
    """Let the C library keep up to 1 GB of freed memory for the next tensor, and not ask the kernel for fresh pages.

    The loop over blocks frees and allocates the same activations thousands of times; fresh pages for each cost a
    fifth of its time (docs/LOG.md). Tensors above 32 MB still go back at once. Elsewhere than on glibc: nothing.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        mallopt(_M_TRIM_THRESHOLD, 1 << 30)
