"""Layer-quality metrics: a spectrum in, one number out. Import a file here to offer its metrics."""

from . import power_law, eigenvalues, random_matrix, farms  # noqa: F401, I001 (in the order the help lists them)
from .base import METRICS, Metric

__all__ = ["METRICS", "Metric"]
