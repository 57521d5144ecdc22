"""The one place that writes: whole files under their name, or nothing."""

import os
import tempfile
from pathlib import Path

from ..errors import RunError


def check_folder(flag: str, path: Path) -> None:
    """Make the folder. Raises RunError naming `flag` where nothing can be written into it."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise RunError(f"{flag} {path}: cannot be written: {error.strerror}") from error


def write_bytes(path: Path, content: bytes) -> None:
    """Write a whole file or none of it. Raises RunError where the disk is full or does not let us."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:
        raise RunError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """`write_bytes` of UTF-8."""
    write_bytes(path, text.encode())


def append_line(path: Path, line: str, header: str) -> None:
    """Add a line at the end of a table, and the header before it where the table is new."""
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(line if file.tell() else header + line)
    except OSError as error:
        raise RunError(f"{path}: cannot be written: {error.strerror or error}") from error
