"""A pruned model's matrices held without their zeros: format, kernels, layer, and the model made of them."""

from .convert import own_dtype, sparse_model
from .format import Packed, pack
from .linear import SparseLinear, pack_for_device

__all__ = ["Packed", "SparseLinear", "own_dtype", "pack", "pack_for_device", "sparse_model"]
