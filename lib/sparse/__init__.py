"""A pruned model's matrices held without their zeros: format, kernels, layer, and the model made of them."""

from .convert import own_dtype, sparse_model
from .format import Packed, pack
from .linear import SparseLinear

__all__ = ["Packed", "SparseLinear", "own_dtype", "pack", "sparse_model"]
