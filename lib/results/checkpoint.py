"""The pruned model as an ordinary Hugging Face checkpoint."""

import dataclasses
import hashlib
import json
import logging
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from .. import generation, ranks
from ..checkpoints import headers
from ..config import RunConfig
from ..errors import RunError
from ..load import Source, find_source, load_model, load_tokenizer
from ..model import LanguageModel
from ..storage import in_save_dtypes, round_to_save_dtypes
from .card import model_card
from .files import atomic_folder, set_default_mode, write_text
from .tokenizer import save_tokenizer

log = logging.getLogger(__name__)

SAMPLES, SAMPLE = 16, 1 << 20  # of a file, to be compressed: how many, bytes

RECORD_FILE = "alphapruning.json"  # in a checkpoint saved here: how it was made, and that it may be replaced


def save_checkpoint(model: LanguageModel, folder: str | Path, record: dict | None = None) -> None:
    """Write an ordinary Hugging Face checkpoint (safetensors, tokenizer, generation config), whole or not at all; on
    the first rank.

    Every tensor is saved in the dtype that the model says, and has the values of that dtype from then on. It is read
    again before it takes its name: RunError where it does not hold the zeros that the model holds, and for values
    that the dtype cannot hold. `record` (run.json without the layers) is put beside it as alphapruning.json.
    """
    folder = Path(folder).resolve()  # what a link leads to is replaced, and not the link
    state = model.state()
    for message in round_to_save_dtypes(state, model.save_dtypes):
        log.warning("%s", message)
    if not ranks.is_main():
        return
    with atomic_folder("--save_model", folder) as temporary:
        state = in_save_dtypes(state, model.save_dtypes)
        held = _zeros(state)
        write_model(model, state, temporary)
        finalize_folder(temporary)
        if (written := _zeros_on_disk(temporary)) != held:
            raise RunError(
                f"--save_model {folder}: holds {written} zeros where the model has {held}; is the disk sound?"
            )
        write_text(temporary / RECORD_FILE, json.dumps(without_layers(record or {}), indent=1) + "\n")
    log.info("checkpoint saved and read again: %s", folder)


def write_model(model: LanguageModel, state: dict[str, Tensor], folder: Path, **options) -> None:
    """Write these tensors of the model, its configurations and its tokenizer."""
    inner = model.model
    inner.generation_config, why = generation.savable(getattr(inner, "generation_config", None))
    if why:
        log.warning("%s", why)
    inner.save_pretrained(folder, state_dict=state, **options)
    if model.tokenizer is not None:
        save_tokenizer(model.tokenizer, folder)


def finalize_folder(folder: Path) -> None:
    """Make what is in a checkpoint's folder consistent: config.json names the dtype that most of the weights have, and
    every file can be read by whoever can read others there.
    """
    sizes: Counter[str] = Counter()
    for header in headers(sorted(folder.glob("*.safetensors")), str(folder)).values():
        if header.dtype is not None:
            sizes[str(header.dtype).removeprefix("torch.")] += math.prod(header.shape)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for part in [config, *(value for value in config.values() if isinstance(value, dict))]:
        if "dtype" in part:
            part["dtype"] = sizes.most_common(1)[0][0]
    write_text(folder / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
    for path in folder.iterdir():
        set_default_mode(path)


def describe_checkpoint(config: RunConfig, record: dict) -> None:
    """Put beside the weights that a run has saved how they were made: run.json without its layers, and a card."""
    folder = Path(config.save_model)
    write_text(folder / RECORD_FILE, json.dumps(without_layers(record), indent=1) + "\n")
    write_text(folder / "README.md", model_card(config, record))
    if ranks.is_main():
        size, compressed = compressed_size(folder)
        log.info("%s: %.2f GB of weights, about %.2f when compressed (zstd -3)", folder, size / 1e9, compressed / 1e9)


def compressed_size(folder: Path) -> tuple[int, int]:
    """Bytes of the weights' files, and about how many `zstd -3` makes of them: told from samples of each."""
    import pyarrow  # takes a while, and has zstd

    size = compressed = 0
    codec = pyarrow.Codec("zstd", compression_level=3)
    for path in folder.glob("*.safetensors"):
        own, taken, left = path.stat().st_size, 0, 0
        count = min(SAMPLES, 1 + own // SAMPLE)
        with path.open("rb") as file:
            for sample in range(count):
                file.seek(max(0, (2 * sample + 1) * own // (2 * count) - SAMPLE // 2))
                data = file.read(SAMPLE)
                taken += len(data)
                left += codec.compress(data).size
        size += own
        compressed += own * left // taken
    return size, compressed


def convert_to_safetensors(source: Source) -> Source:
    """The model in files that can be read in parts: a GGUF file converted, once, under its cache_dir.

    Conversion loads the model whole.
    """
    if not source.gguf:
        return source
    file = Path(source.path) / source.gguf
    origin = f"{file.resolve()} {file.stat().st_size} {file.stat().st_mtime_ns}"
    key = hashlib.sha256(origin.encode()).hexdigest()[:12]
    folder = Path(source.cache_dir) / "converted" / f"{Path(source.name).stem}-{key}"
    if not (folder / RECORD_FILE).is_file() and ranks.is_main():
        log.info("%s: is read whole, once, to be converted", source.name)
        save_checkpoint(load_model(source, "cpu", "float32", load_tokenizer(source)), folder)
        log.info("%s: converted to safetensors in %s", source.name, folder)
    ranks.barrier()
    return dataclasses.replace(find_source(str(folder), source.cache_dir), name=source.name)


def without_layers(record: dict) -> dict:
    """run.json as it is put into a checkpoint."""
    return {key: value for key, value in record.items() if key != "layers"}


def _zeros_on_disk(folder: Path) -> int:
    """Zeros in all tensors of a folder's safetensors files, one tensor in memory at a time."""
    zeros = 0
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (a safetensors handle is no mapping)
                tensor = file.get_tensor(name)
                zeros += tensor.numel() - int(tensor.count_nonzero())
    return zeros


def _zeros(state: Mapping[str, Tensor]) -> int:
    """Zeros in all tensors, what shares storage counted once."""
    tensors = {(t.data_ptr(), t.shape): t for t in state.values()}
    return sum(tensor.numel() - int(tensor.count_nonzero()) for tensor in tensors.values())
