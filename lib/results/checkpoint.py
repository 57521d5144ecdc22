"""The pruned model as an ordinary Hugging Face checkpoint."""

import dataclasses
import hashlib
import json
import logging
import shutil
import tempfile
from pathlib import Path

import transformers
from safetensors import SafetensorError, safe_open

from .. import ranks
from ..errors import RunError
from ..load import Source, find_source, load_config, load_model, load_tokenizer, safetensors_files
from ..model import LanguageModel
from .files import write_text
from .tokenizer import save_tokenizer

log = logging.getLogger(__name__)

MARK = "alphapruning.json"  # in a checkpoint saved here: how it was made, and that it may be replaced


def save_checkpoint(model: LanguageModel, folder: str | Path, record: dict | None = None) -> None:
    """Write an ordinary Hugging Face checkpoint (safetensors, tokenizer, generation config), whole or not at all; on
    the first rank.

    It is read again before it takes its name: RunError where it does not hold the zeros that the model holds.
    `record` (run.json without the layers) is put beside it as alphapruning.json.
    """
    folder = Path(folder)
    if not ranks.first():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        make_savable(model.model.generation_config)
        model.model.save_pretrained(temporary)
        if model.tokenizer is not None:
            save_tokenizer(model.tokenizer, temporary)
        write_text(temporary / MARK, json.dumps(without_layers(record or {}), indent=1) + "\n")
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


def as_safetensors(source: Source) -> Source:
    """The model as safetensors files: where it is in any other form, converted once under its cache_dir.

    Conversion loads the model whole.
    """
    if safetensors_files(source):
        return source
    if source.gguf:
        file = Path(source.path) / source.gguf
        origin, dtype = f"{file.resolve()} {file.stat().st_size} {file.stat().st_mtime_ns}", "float32"
    else:
        origin, dtype = source.path, str(load_config(source).dtype or "float32").removeprefix("torch.")
    key = hashlib.sha256(origin.encode()).hexdigest()[:12]
    folder = Path(source.cache_dir) / "converted" / f"{Path(source.name).stem}-{key}"
    if not (folder / MARK).is_file() and ranks.first():
        log.info("%s: has no safetensors; reading it whole, once, to convert it", source.name)
        save_checkpoint(load_model(source, "cpu", dtype, load_tokenizer(source)), folder)
        log.info("%s: converted to safetensors in %s", source.name, folder)
    ranks.barrier()
    return dataclasses.replace(find_source(str(folder), source.cache_dir), name=source.name)


def without_layers(record: dict) -> dict:
    """run.json as it is put into a checkpoint."""
    return {key: value for key, value in record.items() if key != "layers"}


def make_savable(config: transformers.GenerationConfig | None) -> None:
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
