"""Thousands of small kernels asked for as one."""

from collections.abc import Callable

import torch


def captured(function: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """`function`, which changes tensors in place, as a CUDA graph of its kernels on `device`, a GPU.

    It must not wait for the GPU, and reads and writes the very same tensors at each call; it runs once for warming up.
    """
    with torch.cuda.device(device):
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            function()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            function()
    return graph.replay
