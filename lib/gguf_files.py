"""GGUF files as transformers reads them: without doing the same work again, and by a version that is known to read them
right.
"""

import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy
import transformers
from packaging.version import Version

log = logging.getLogger(__name__)

TESTED = "5.24.0"  # transformers, as in requirements.txt


class _PlainArray:
    """An attribute that keeps a memory map as an ordinary array: of a map, numpy makes every part in Python."""

    def __set_name__(self, _owner: type, name: str):
        self.name = name

    def __set__(self, reader, array: numpy.memmap):
        vars(reader)[self.name] = array.view(numpy.ndarray)


@functools.lru_cache(maxsize=1)
def _reader(path: str, _changed: int, kind: type):
    return type(kind.__name__, (kind,), {"data": _PlainArray()})(path)


@contextmanager
def read_once() -> Iterator[None]:
    """While transformers reads GGUF files: it parses the header, with a vocabulary of up to hundreds of thousands of
    tokens in it, anew for the configuration, the tokenizer and the weights, and makes the architecture's list of names
    anew for every module. Each takes seconds.
    """
    import gguf  # half a second

    reader, names = gguf.GGUFReader, gguf.get_tensor_name_map
    gguf.GGUFReader = lambda path: _reader(str(path), Path(path).stat().st_mtime_ns, reader)
    gguf.get_tensor_name_map = functools.lru_cache(maxsize=1)(names)
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = reader, names


forget_header = _reader.cache_clear


@functools.cache
def warn_of_old_transformers() -> None:
    """Say once that the tokenizer may be another: out of Gemma 3's file 5.17 makes one that cuts most words otherwise,
    and a perplexity of 113 where it is 25.
    """
    if Version(transformers.__version__) < Version(TESTED):
        log.warning(
            "transformers %s is older than %s, with which GGUF files were tried: it may cut texts into other tokens "
            "than the model knows", transformers.__version__, TESTED,
        )  # fmt: skip
