"""What lies in the weight files of a checkpoint: tensors by name, whose values are read one at a time.

A file is safetensors or a pickle of PyTorch's; both are mapped into memory, so that only what is asked for is read (but
for pickles from before 2020, which are read whole).
"""

import json
import os
import re
import warnings
import zipfile
from collections.abc import Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import RunError

# In the order in which transformers looks for them.
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")

PLAIN = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
LFS = b"version https://git-lfs"
INDICES = ("BOOL", "I64", "bool", "int64")  # what masks and positions are stored as, and weights never


def read_index(path: Path, label: str) -> tuple[dict, set[str]]:
    """An index of weights, and the files that it names. Raises RunError, after `label`, for what is none."""
    try:
        index = json.loads(path.read_text())
        return index, {os.fspath(file) for file in index["weight_map"].values()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{label}: {path.name} is no index of weights: {error!r}") from error


@dataclass(frozen=True)
class Header:
    """What a file says of a tensor: `dtype` is None where its values are no weights as such but a code for them, or
    no weights at all; `stored` is the name of the type in the file.
    """

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype | None
    stored: str

    @property
    def coded(self) -> bool:
        """Whether the values may be a code for weights: whole numbers, or floats of eight bits or fewer."""
        return self.dtype is None and self.stored not in INDICES


class _Pickled(dict):
    """The tensors of a pickle, as safetensors shows those of its own."""

    def get_slice(self, name: str) -> Tensor:
        return self[name]


class _PickledOfOld(_Pickled):
    """Of a file that is read whole and kept: nobody gets the tensors themselves."""

    def get_slice(self, name: str) -> Tensor:
        return self[name].clone()


def _unpickled(path: Path, model: str) -> _Pickled:
    try:
        if zipfile.is_zipfile(path):
            return _Pickled(_tensors(path, mmap=True))
        stat = path.stat()
        return _whole(path, (stat.st_size, stat.st_mtime_ns))
    except UnpicklingError as error:  # its message advises to load the file without this safety
        if _is_pointer(path):
            raise _unreadable(path, model, error) from error
        named = re.search(r"GLOBAL (\S+)", str(error))
        raise RunError(
            f"--model {model}: its weights cannot be loaded: {path.name} is damaged or holds more than tensors"
            + (f" ({named[1]}, which loading it would call)" if named else "")
            + ", and was not loaded; get the model as safetensors, or from its maker"
        ) from error
    except (OSError, EOFError, AttributeError, TypeError, RuntimeError) as error:
        raise _unreadable(path, model, error) from error


@lru_cache(maxsize=1)
def _whole(path: Path, _changed: tuple[int, int]) -> _PickledOfOld:
    """Of a format that cannot be read in parts."""
    return _PickledOfOld(_tensors(path, mmap=False))


def _tensors(path: Path, mmap: bool) -> dict[str, Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the pickle's protocol
        held = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    if not isinstance(held, dict) or not all(isinstance(name, str) for name in held):
        raise TypeError("it does not hold tensors by name")
    tensors = {name: value for name, value in held.items() if isinstance(value, Tensor)}
    for name, value in tensors.items():
        if value.is_meta or value.layout != torch.strided:
            raise TypeError(f"{name} is {'without values' if value.is_meta else 'stored as a sparse tensor'}")
    return tensors


def _is_pointer(path: Path) -> bool:
    """Whether the file is what git puts in the place of one that Git LFS keeps."""
    with path.open("rb") as file:
        return file.read(len(LFS)) == LFS


def _unreadable(path: Path, model: str, error: Exception) -> RunError:
    reason = str(getattr(error, "strerror", None) or error or type(error).__name__)
    if not isinstance(error, OSError) and _is_pointer(path):
        reason = "it is a pointer of Git LFS and not the file itself; run git lfs pull"
    return RunError(
        f"--model {model}: its weights cannot be loaded: {path.name} cannot be read: {' '.join(reason.split())[:200]}"
    )


@contextmanager
def opened(path: Path, model: str):
    """The file, with `keys()` and with `get_slice(name)`, which reads nothing before it is indexed.

    Raises RunError naming `model` where the file cannot be read, and where it is a pickle of more than tensors.
    """
    if path.suffix != ".safetensors":
        yield _unpickled(path, model)
        return
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, model, error) from error


def headers(files: Iterable[Path], model: str) -> dict[str, Header]:
    """Every tensor of the files by name; of several with one name the last, as transformers has it."""
    found = {}
    for path in files:
        with opened(path, model) as file:
            for name in file.keys():  # noqa: SIM118 (a safetensors handle is no mapping)
                tensor = file.get_slice(name)
                if isinstance(tensor, Tensor):
                    stored, shape = str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)
                    dtype = tensor.dtype if tensor.dtype in PLAIN.values() else None
                else:
                    stored, shape = tensor.get_dtype(), tuple(tensor.get_shape())
                    dtype = PLAIN.get(stored)
                found[name] = Header(path, shape, dtype, stored)
    return found
