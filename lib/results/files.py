"""The one place that writes: whole files under their name, or nothing."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from .. import ranks
from ..errors import RunError


def check_folder(flag: str, path: Path) -> None:
    """Make the folder. Raises RunError naming `flag` where nothing can be written into it."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise RunError(f"{flag} {path}: cannot be written: {error.strerror}") from error


def write_file(path: Path, write: Callable[[Path], None]) -> None:
    """`write` a whole file under a temporary name, see it safe on disk, and rename it; or leave nothing.

    Does nothing on any rank but the first. Raises RunError where the disk is full or does not let us.
    """
    if not ranks.is_main():
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        set_default_mode(temporary)
        _sync(temporary)
        temporary.replace(path)
        _sync(path.parent)
    except (OSError, SafetensorError) as error:
        raise RunError(f"{path}: cannot be written: {getattr(error, 'strerror', None) or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(flag: str, folder: Path) -> Iterator[Path]:
    """A folder to write into, which takes the place of `folder` in the end; or leave nothing, and `folder` as it was.

    Raises RunError naming `flag` where it cannot be written.
    """
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        remove(temporary)
        temporary.mkdir(parents=True)
        yield temporary
        remove(folder)
        temporary.replace(folder)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RunError(f"{flag} {folder}: cannot be written: {reason}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def set_default_mode(path: Path) -> None:
    """Give a file the mode that any new file in its folder gets; some libraries write theirs for the owner alone."""
    probe = path.with_name(f".{path.name}.mode")
    probe.touch()
    try:
        path.chmod(probe.stat().st_mode & 0o777)
    finally:
        probe.unlink()


def _sync(path: Path) -> None:
    """Wait until the disk holds the file, or the folder's list of names."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_bytes(path: Path, content: bytes) -> None:
    """`write_file` of these bytes."""
    write_file(path, lambda temporary: temporary.write_bytes(content))


def write_text(path: Path, text: str) -> None:
    """`write_file` of UTF-8."""
    write_bytes(path, text.encode())


def remove(folder: Path) -> None:
    """Remove a folder with all that is in it, if it is there; on the first rank."""
    if ranks.is_main() and folder.exists():
        shutil.rmtree(folder)


def append_line(path: Path, line: str, header: str) -> None:
    """Add a line at the end of a table, and the header before it where the table is new; on the first rank.

    A table from before its last columns gets them, empty in the rows that it has.
    """
    if not ranks.is_main():
        return
    try:
        if path.is_file():
            first, *rows = path.read_text(encoding="utf-8").splitlines(keepends=True) or [header]
            more = header.rstrip("\n").removeprefix(first.rstrip("\n"))
            if more and header.startswith(first.rstrip("\n") + "\t"):
                empty = "\t" * more.count("\t")
                write_text(path, header + "".join(row.rstrip("\n") + empty + "\n" for row in rows))
        with path.open("a", encoding="utf-8") as file:
            file.write(line if file.tell() else header + line)
    except OSError as error:
        raise RunError(f"{path}: cannot be written: {error.strerror or error}") from error
