"""Fixtures of several test files."""

import pytest
import torch

from lib import precision


@pytest.fixture
def exact_gradients(monkeypatch):
    """Gradients in float32 where the machine would take them in bfloat16."""
    monkeypatch.setattr(precision, "fast_type", lambda _device: torch.float32)
