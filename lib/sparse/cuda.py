"""Products with matrices without their zeros on a GPU, in Triton; with those that are 2:4, by torch's own tensors."""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .format import Form
from .sliced import Sliced

AT_ONCE = 16  # tokens that the kernel is given where nothing is measured


def is_two_of_four(weight: Tensor) -> bool:
    """Whether torch has semi-structured tensors for such a matrix: on cuda, in 16 bits, at most two of every four
    weights along the input other than zero, and sizes that its kernels take.
    """
    if not weight.is_cuda or weight.dtype not in (torch.float16, torch.bfloat16):
        return False
    if weight.shape[0] % 32 or weight.shape[1] % 64:
        return False
    return int((weight.reshape(-1, 4) != 0).sum(1).max()) <= 2


def semi_structured(module: nn.Module, weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(torch.sparse.to_sparse_semi_structured(weight.contiguous()), requires_grad=False)
    layer.bias = copy.copy(getattr(module, "bias", None))
    return layer.eval()


def multiply(packed: Sliced, x: Tensor) -> Tensor:
    """x (tokens, columns) times the matrix, transposed; (tokens, rows) in the dtype of x, or float32 for more."""
    from .gpu_kernel import multiply as by_kernel  # Triton comes with torch's build for CUDA only

    return by_kernel(packed, x)


def product(packed: Form, x: Tensor) -> Tensor:
    """x (tokens, columns) times the matrix, transposed, which is unpacked whole."""
    return F.linear(x, packed.dense().to(x.dtype))
