"""GGUF files as transformers reads them: the header parsed once, and by a version that is known to read them right."""

import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import transformers
from packaging.version import Version

log = logging.getLogger(__name__)

TESTED = "5.24.0"  # transformers, as in requirements.txt


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
