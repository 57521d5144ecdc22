"""The mask of a model's zeros."""

import hashlib

import numpy
from torch import Tensor

from ..memory import copy_to_host
from ..model import LanguageModel


class ZeroMask:
    """The zeros of every prunable matrix of a model as it is now; a bit a weight.

    digest  SHA-256 of the matrices' names, shapes and bits, in module order
    count   how many there are
    """

    def __init__(self, model: LanguageModel):
        self._bits = {matrix.name: _bits(matrix.weight) for matrix in model.matrices}
        self.count = sum(matrix.size - int(matrix.weight.count_nonzero()) for matrix in model.matrices)
        hashed = hashlib.sha256()
        for matrix in model.matrices:
            hashed.update(f"{matrix.name} {matrix.shape}".encode())
            hashed.update(self._bits[matrix.name])
        self.digest = hashed.hexdigest()

    def filled(self, model: LanguageModel) -> dict[str, int]:
        """How many of these zeros are none in the model, by matrix; of matrices where there are any."""
        found = {}
        for matrix in model.matrices:
            more = ~self._bits[matrix.name] & _bits(matrix.weight)  # bits are set where a weight is left
            if count := int(numpy.unpackbits(more).sum()):
                found[matrix.name] = count
        return found


def _bits(weight: Tensor) -> numpy.ndarray:
    """A set bit where there is a weight, by rows; the last byte's rest is set in none."""
    return numpy.packbits(copy_to_host((weight != 0).contiguous()).numpy())
