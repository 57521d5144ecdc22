"""The tokenizer beside a checkpoint."""

import json
from pathlib import Path

from ..tokens import SETTINGS, LlamaTokenizer
from .files import write_text


def save_tokenizer(tokenizer, folder: Path) -> None:
    """Write it so that it gives the same tokens when it is read again, here and by transformers."""
    tokenizer.save_pretrained(folder)
    if isinstance(tokenizer, LlamaTokenizer):
        path = Path(folder) / SETTINGS
        settings = tokenizer.settings(json.loads(path.read_text("utf-8")))
        write_text(path, json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
