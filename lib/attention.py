"""Which of torch's attention kernels passes take."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def without_cudnn_attention() -> Iterator[None]:
    """For work at many lengths: no attention by cuDNN, which torch prefers for 16 bits on recent GPUs and which makes a
    plan for each shape that it has not seen. On an H100 that takes 60 ms for every token of a text that is written.
    """
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
