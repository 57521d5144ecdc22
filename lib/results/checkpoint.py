"""The pruned model as an ordinary Hugging Face checkpoint."""

import json
import logging
import shutil
import tempfile
from pathlib import Path

import transformers
from safetensors import SafetensorError, safe_open

from ..errors import RunError
from ..model import LanguageModel
from .files import write_text

log = logging.getLogger(__name__)

MARK = "alphapruning.json"  # in a checkpoint saved here: how it was made, and that it may be replaced


def save_checkpoint(model: LanguageModel, folder: str | Path, record: dict | None = None) -> None:
    """Write an ordinary Hugging Face checkpoint (safetensors, tokenizer, generation config), whole or not at all.

    It is read again before it takes its name: RunError where it does not hold the zeros that the model holds.
    `record` (run.json without the layers) is put beside it as alphapruning.json.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        _make_savable(model.model.generation_config)
        model.model.save_pretrained(temporary)
        if model.tokenizer is not None:
            model.tokenizer.save_pretrained(temporary)
        kept = {key: value for key, value in (record or {}).items() if key != "layers"}
        write_text(temporary / MARK, json.dumps(kept, indent=1) + "\n")
        written, held = _zeros_on_disk(temporary), _zeros_in_memory(model)
        if written != held:
            raise RunError(
                f"--save_model {folder}: holds {written} zeros where the model has {held}; is the disk sound?"
            )
        temporary.chmod(0o755)
        if folder.exists():
            shutil.rmtree(folder)
        temporary.replace(folder)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RunError(f"--save_model {folder}: cannot be written: {reason}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    log.info("checkpoint saved and read again: %s", folder)


def _make_savable(config: transformers.GenerationConfig | None) -> None:
    """transformers refuses to save what some models on the hub have: a temperature with sampling off."""
    try:
        if config is not None:
            config.validate(strict=True)
    except ValueError as error:
        log.warning(
            "generation config: do_sample set, as it could not be saved otherwise (%s)", str(error).split("\n")[0]
        )
        config.do_sample = True


def _zeros_on_disk(folder: Path) -> int:
    """Zeros in all tensors of a folder's safetensors files, one tensor in memory at a time."""
    zeros = 0
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (a safetensors handle is no mapping)
                tensor = file.get_tensor(name)
                zeros += tensor.numel() - int(tensor.count_nonzero())
    return zeros


def _zeros_in_memory(model: LanguageModel) -> int:
    """Zeros in all tensors of the model's state, tied ones counted once."""
    tensors = {(t.data_ptr(), t.shape): t for t in model.model.state_dict().values()}
    return sum(tensor.numel() - int(tensor.count_nonzero()) for tensor in tensors.values())
