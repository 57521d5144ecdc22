"""Pruners: one matrix and what is known of its input in, the pruned matrix out. Import a file here to offer it."""

from . import magnitude, sparsegpt, wanda  # noqa: F401
from .base import PRUNERS, Pruner

__all__ = ["PRUNERS", "Pruner"]
