"""Layer quality to sparsity per matrix. Import a file here to offer its allocation.

`allocate` is the one entry: it runs an allocation by name and rounds the result to N:M where asked.
"""

from . import uniform, ww  # noqa: F401
from .base import ALLOCATIONS, Problem, allocate

__all__ = ["ALLOCATIONS", "Problem", "allocate"]
