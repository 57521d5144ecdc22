"""Layer quality to sparsity per matrix. Import a file here to offer its allocations.

`allocate` is the one entry: it runs an allocation by name and rounds the result to N:M where asked.
"""

from . import uniform, ww, activations, fixed, search, file  # noqa: F401, I001 (in the order the help lists them)
from .base import ALLOCATIONS, Problem, allocate

__all__ = ["ALLOCATIONS", "Problem", "allocate"]
