"""What a matrix is multiplied with, seen where it happens: in the products of the forward pass itself.

However a module stores its matrices and slices, turns or batches them, in the end each is a factor of a product, and
the other factor is its input.
"""

from bisect import bisect_right
from collections import defaultdict

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .errors import RunError

_ATEN = torch.ops.aten
_FACTORS = {
    _ATEN.mm.default: (0, 1),
    _ATEN.addmm.default: (1, 2),
    _ATEN.bmm.default: (0, 1),
    _ATEN.baddbmm.default: (1, 2),
}


class Products(TorchDispatchMode):
    """While active, remembers which of some matrices were multiplied with what.

    matrices  objects with `weight` (out, in), a view of a parameter, and `name`
    found     (matrix, input (tokens, in)) by product, in order
    """

    def __init__(self, matrices):
        super().__init__()
        self.found: list[tuple[object, Tensor]] = []
        of_storage = defaultdict(list)
        for matrix in matrices:
            weight = matrix.weight
            of_storage[_storage(weight)].append((weight.storage_offset(), matrix, weight))
        self._of_storage = {key: sorted(held, key=lambda entry: entry[0]) for key, held in of_storage.items()}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func in _FACTORS:
            left, right = (args[index] for index in _FACTORS[func])
            self._note(left, right)
            self._note(right.mT, left.mT)
        return result

    def _note(self, x: Tensor, factor: Tensor) -> None:
        """x (tokens, in) times a factor (in, out), or a batch of such products."""
        if _storage(factor) not in self._of_storage:
            return
        for one_x, one in zip(x, factor, strict=True) if factor.dim() == 3 else [(x, factor)]:
            matrix = self._matrix(one)
            if matrix is not None:
                self.found.append((matrix, one_x))

    def _matrix(self, factor: Tensor):
        """The matrix of which the factor (in, out) is the whole or some of the outputs."""
        held = self._of_storage[_storage(factor)]
        at = bisect_right(held, factor.storage_offset(), key=lambda entry: entry[0]) - 1
        if at < 0:
            return None
        offset, matrix, weight = held[at]
        if _is_rows(factor.T, weight, factor.storage_offset() - offset):
            return matrix
        if _is_rows(factor, weight, factor.storage_offset() - offset):
            raise RunError(
                f"{matrix.name}: is multiplied the other way round than its shape and its neighbours' tell, so that "
                "its inputs and outputs are not known apart"
            )
        return None


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _is_rows(part: Tensor, weight: Tensor, offset: int) -> bool:
    """Whether `part` is some rows of `weight`, in whose storage it begins `offset` later."""
    first, rest = divmod(offset, weight.stride(0))
    return (
        part.shape[1] == weight.shape[1]
        and rest == 0
        and first + len(part) <= len(weight)
        and (len(part) == 1 or part.stride(0) == weight.stride(0))
        and (part.shape[1] == 1 or part.stride(1) == weight.stride(1))
    )
