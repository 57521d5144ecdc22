"""Layer-quality metrics: a spectrum in, one number out. Import a file here to offer its metrics."""

from . import power_law  # noqa: F401
from .base import METRICS, Metric

__all__ = ["METRICS", "Metric"]
