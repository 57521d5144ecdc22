"""The header of a GGUF file, parsed once."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@functools.lru_cache(maxsize=1)
def _reader(path: str, _changed: int, kind: type):
    return kind(path)


@contextmanager
def header_parsed_once() -> Iterator[None]:
    """While transformers reads GGUF files: it parses the header, with a vocabulary of up to hundreds of thousands of
    tokens in it, anew for the configuration, the tokenizer and the weights, and each time that takes seconds.
    """
    import gguf  # half a second

    original = gguf.GGUFReader
    gguf.GGUFReader = lambda path: _reader(str(path), Path(path).stat().st_mtime_ns, original)
    try:
        yield
    finally:
        gguf.GGUFReader = original


forget_header = _reader.cache_clear
