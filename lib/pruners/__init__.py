"""Pruners: one matrix and what is known of its input in, the pruned matrix out. Import a file here to offer it."""

from . import magnitude, wanda, ria, sparsegpt, alps  # noqa: F401, I001 (in the order the help lists them)
from .base import PRUNERS, Pruner

__all__ = ["PRUNERS", "Pruner"]
