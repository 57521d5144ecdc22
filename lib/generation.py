"""A model's generation configuration, which pruning does not read and a checkpoint is saved with."""

import json
from pathlib import Path

from transformers import GenerationConfig


def read(own: GenerationConfig | None, file: str | Path | None) -> tuple[GenerationConfig | None, str | None]:
    """The configuration in `file`, or where there is none the model's `own`, such that it can be saved; and what had
    to be done for that, or None.
    """
    if file is None:
        return savable(own)
    try:
        return savable(GenerationConfig.from_dict(json.loads(Path(file).read_text(encoding="utf-8"))))
    except Exception as error:  # of whatever kind: nothing here is worth the end of a run
        return GenerationConfig(), f"generation_config.json cannot be read, and is left out: {_in_a_line(error)}"


def savable(config: GenerationConfig | None) -> tuple[GenerationConfig | None, str | None]:
    """The configuration, changed where transformers would refuse to save it, and what was done."""
    if config is None or (error := _refusal(config)) is None:
        return config, None
    sampling = GenerationConfig.from_dict(config.to_dict() | {"do_sample": True})
    if _refusal(sampling) is None:  # many on the hub have a temperature with sampling off
        return sampling, f"generation config: do_sample set, as it could not be saved otherwise ({error})"
    return GenerationConfig(), f"generation config: left out, as it could not be saved ({error})"


def _refusal(config: GenerationConfig) -> str | None:
    try:
        config.validate(strict=True)
    except Exception as error:
        return _in_a_line(error)
    return None


def _in_a_line(error: Exception) -> str:
    """What it says, up to the first reason; transformers gives each in a line of its own below a heading."""
    said = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(said[: 2 if said[0].endswith(":") else 1])
