"""Fixtures of several test files."""

import os
from pathlib import Path

import forking
import pytest
import torch
from filelock import FileLock
from shared import MODEL
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lib import precision

if not torch.cuda.is_available():  # before anything imports Triton, whose own functions are made once
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture
def exact_gradients(monkeypatch):
    """Gradients in float32 where the machine would take them in bfloat16."""
    monkeypatch.setattr(precision, "fast_dtype", lambda _device: torch.float32)


@pytest.fixture(scope="session")
def embedded(tmp_path_factory) -> Path:
    """The embedded model in an ordinary folder, written by the command with nothing to remove.

    Reading its GGUF file takes half a minute: the first worker that wants it does, for all.
    """
    base = tmp_path_factory.getbasetemp()
    out = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "embedded"
    with FileLock(out.with_suffix(".lock")):
        if not (out / "smollm2" / "config.json").is_file():
            flags = ["--model", "smollm2", "--prune_method", "magnitude", "--sparsity_ratio", "0", "--no-eval_wikitext"]
            folders = ["--cache_dir", str(MODEL.parent), "--save", str(out / "results")]
            saved = ["--save_model", str(out / "smollm2"), "--device", "cpu", "--dtype", "float32"]
            done = forking.run("main.py", [*flags, *folders, *saved])
            assert done.returncode == 0, done.stderr
            assert "magnitude on smollm2:" in done.stdout
    return out / "smollm2"


@pytest.fixture(scope="session")
def tokenizer():
    """One token a byte, so that a text's tokens can be written down."""
    vocabulary = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return PreTrainedTokenizerFast(tokenizer_object=backend)
