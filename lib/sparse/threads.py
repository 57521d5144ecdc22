"""Runs a C function of one address on several threads at once: those of torch's own pool where it can be had."""

import ctypes
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import torch


def run(address: int, job: int) -> None:
    """Call the function at `address` with `job`, on as many threads as torch computes with."""
    count = torch.get_num_threads()
    if count == 1:
        _function(address)(job)
    elif parallel := _of_torch():
        parallel(address, job, count, 0)
    else:
        work = _function(address)
        others = [_pool(count - 1).submit(work, job) for _ in range(count - 1)]
        work(job)
        wait(others)


@functools.cache
def _of_torch() -> Callable | None:
    """How GCC's OpenMP, and LLVM's in its place, is asked for a parallel region: of the very library that torch
    computes with, so that no two pools of threads wait for each other.
    """
    for library in Path(torch.__file__).parent.joinpath("lib").glob("libtorch_cpu.*"):
        try:
            parallel = ctypes.CDLL(str(library)).GOMP_parallel
        except (AttributeError, OSError):
            continue
        parallel.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
        parallel.restype = None
        return parallel
    return None


@functools.cache
def _pool(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count)


@functools.cache
def _function(address: int) -> Callable[[int], None]:
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address)
