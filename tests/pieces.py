"""Sentencepiece models of some hundred pieces, and folders as they lie on the hub with one in them."""

import io
import json
import random
from pathlib import Path

import sentencepiece
import transformers

TEXT = "the of and in to river stone light house garden table number first with which from naïve café"
WORDS = TEXT.split()


def text_of(words: int, seed: int = 0) -> str:
    """Words of the training text at random."""
    rng = random.Random(seed)
    return " ".join(rng.choice(WORDS) for _ in range(words))


def train(**options) -> bytes:
    """A sentencepiece model; as LLaMA's but for its size unless `options` say otherwise."""
    written = io.BytesIO()
    own = {
        "model_type": "bpe", "vocab_size": 340, "byte_fallback": True, "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False, "character_coverage": 1.0, "hard_vocab_limit": False, "minloglevel": 2,
    }  # fmt: skip
    sentences = (text_of(12, seed) for seed in range(400))
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=sentences, model_writer=written, **(own | options))
    return written.getvalue()


def model_folder(folder: Path, model: bytes, settings: dict | None = None, **config) -> Path:
    """A folder with `model` as tokenizer.model, a configuration, and `settings` as tokenizer_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model)
    config = {"model_type": "llama", "vocab_size": 340, "bos_token_id": 1, "eos_token_id": 2} | config
    (folder / "config.json").write_text(json.dumps(config))
    if settings is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def load(folder: Path):
    """What transformers itself makes of the folder."""
    return transformers.AutoTokenizer.from_pretrained(folder)
