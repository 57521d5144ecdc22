"""Texts on this machine, row by row: .txt, JSON, parquet and folders saved by `datasets`, packed or not.

A row is a text or, where there is a column `messages` in place of `text`, a conversation: a list of messages. Rows come
in order one at a time, or by number from a `Shard`, so that no file is held whole that need not be.
"""

import codecs
import errno
import io
import json
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from .errors import RunError, reason_of

Row = str | list[dict]

SUFFIXES = (".txt", ".json", ".jsonl", ".parquet")
PACKED = (".gz", ".zst")
COLUMNS = ("text", "messages")  # the first that is there is read
MARKS = {  # those of UTF-32 before UTF-16, with which one of them begins
    codecs.BOM_UTF8: "utf-8", codecs.BOM_UTF32_LE: "utf-32-le", codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be",
}  # fmt: skip
LOOK = 4096  # bytes at the beginning by which a file's form is told


def file_format(path: Path) -> str | None:
    """Which of SUFFIXES the file's name ends in, packed or not; None for any other."""
    bare = path.with_suffix("") if path.suffix in PACKED else path
    packed_itself = bare.suffix == ".parquet" and bare != path
    return bare.suffix if bare.suffix in SUFFIXES and not packed_itself else None


def rows(label: str, path: Path, split: str) -> Iterable[Row]:
    """The rows in order. `split` is the one wanted of a saved folder that has several; `label` is the flag and its
    value. Raises RunError for what is no row.
    """
    if path.is_dir():
        return _Saved(label, path, split)
    if file_format(path) == ".txt":
        return list(filter(None, [_whole(label, path)]))
    lines = (line for line in _lines(label, path) if not line.isspace())
    return (_row(label, number, _parsed(label, number, line)) for number, line in enumerate(lines))


def indexed_rows(label: str, path: Path, split: str) -> Sequence[Row]:
    """The rows by number, otherwise as `rows`; of what has rows, which a .txt has not."""
    return _Saved(label, path, split) if path.is_dir() else Shard(label, path)


@contextmanager
def read_errors(label: str) -> Iterator[None]:
    """Around whatever reads a text: what keeps a library from reading it is one line."""
    try:
        yield
    except (RunError, MemoryError):
        raise
    except UnicodeDecodeError as error:
        raise RunError(f"{label}: is not {error.encoding} ({error.reason}); save it as UTF-8") from error
    except Exception as error:  # datasets and pyarrow have no common base class
        if getattr(error, "errno", None) == errno.ENOSPC:
            raise RunError(f"{label}: does not fit, unpacked, into {tempfile.gettempdir()}; set TMPDIR") from error
        raise RunError(f"{label}: cannot be read ({reason_of(error)})") from error


class Shard(Sequence[Row]):
    """The rows of a JSON or parquet file: read once to learn where each begins, and parsed when asked for.

    JSON lines are read where they lie; what is packed or of another form is unpacked into a temporary file.
    """

    def __init__(self, label: str, path: Path):
        self._asked, self._begins = label, array("q")
        unpacked = _lies_open(path)
        self._file = path.open("rb") if unpacked else tempfile.TemporaryFile()  # noqa: SIM115 (closed with the shard)
        position = 0
        for line in _lines(label, path):
            if not line.isspace():
                self._begins.append(position)
            position += len(line)
            if not unpacked:
                self._file.write(line)

    def __len__(self) -> int:
        return len(self._begins)

    def __getitem__(self, number: int) -> Row:
        self._file.seek(self._begins[number])
        return _row(self._asked, number, _parsed(self._asked, number, self._file.readline()))


class _Saved(Sequence[Row]):
    """The rows of a folder saved by `datasets`."""

    def __init__(self, label: str, path: Path, split: str):
        import datasets  # takes a second to import, and other texts do without

        data = datasets.load_from_disk(str(path))
        if isinstance(data, datasets.DatasetDict):
            if split not in data:
                raise RunError(f"{label}: has no split '{split}', only {', '.join(data)}")
            data = data[split]
        self._asked, self._rows = label, data.select_columns(_column(label, data.column_names))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: int) -> Row:
        return _row(self._asked, number, self._rows[number])


def _packing(begins: bytes) -> str | None:
    """By how a file begins, whatever its name says: names are kept when a file is unpacked."""
    if begins[1:4] == b"\x2a\x4d\x18":  # what some packers put before zstd's first frame
        return "zstd"
    return {b"\x1f\x8b": "gzip", b"\x28\xb5": "zstd"}.get(begins[:2])


def _lies_open(path: Path) -> bool:
    """Whether the file's own bytes are JSON lines in UTF-8."""
    with path.open("rb") as file:
        begins = file.read(LOOK)
    marked = any(begins.startswith(mark) for mark in MARKS)
    return file_format(path) != ".parquet" and not (marked or _packing(begins) or begins.lstrip().startswith(b"["))


@contextmanager
def _open(label: str, path: Path) -> Iterator[tuple[io.BufferedReader, str]]:
    """The file's bytes, unpacked and after the byte-order mark, and their encoding: what the mark says, or UTF-8."""
    file = path.open("rb")
    if packing := _packing(file.peek(4)[:4]):
        import pyarrow  # takes a moment to import, and other texts do without

        file = io.BufferedReader(pyarrow.CompressedInputStream(file, packing), 2**20)
    with file:
        begins = file.peek(LOOK)[:LOOK]
        mark = next((mark for mark in MARKS if begins.startswith(mark)), b"")
        if not mark and b"\0" in begins:
            what = "UTF-16 without a byte-order mark, packed with neither gzip nor zstd, or no text"
            raise RunError(f"{label}: holds zero bytes ({what}); save it as UTF-8, or packed with gzip or zstd")
        file.read(len(mark))
        yield file, MARKS.get(mark, "utf-8")


def _whole(label: str, path: Path) -> str:
    with _open(label, path) as (file, encoding):
        return io.TextIOWrapper(file, encoding).read()


def _lines(label: str, path: Path) -> Iterator[bytes]:
    """Lines of JSON in UTF-8, of which each that is not blank is a row."""
    if file_format(path) == ".parquet":
        yield from map(_line, _parquet(label, path))
        return
    with _open(label, path) as (file, encoding):
        lines = file
        if encoding != "utf-8":
            lines = (line.encode() for line in io.TextIOWrapper(file, encoding, newline="\n"))
        blank = True  # so far
        for line in lines:
            if blank and line.lstrip().startswith(b"["):  # one array
                yield from map(_line, json.loads(line + b"".join(lines)))
                return
            blank = blank and line.isspace()
            yield line


def _line(record: object) -> bytes:
    return json.dumps(record, default=str).encode() + b"\n"  # a time beside a message, say


def _parquet(label: str, path: Path) -> Iterator[dict]:
    from pyarrow import parquet, types  # takes a moment to import, and other texts do without

    # Without a buffer of its own it holds a whole row group, which may be the whole file.
    with parquet.ParquetFile(path, buffer_size=2**20, pre_buffer=False) as file:
        column = _column(label, file.schema_arrow.names)
        held = file.schema_arrow.field(column).type
        text = held.value_type if types.is_dictionary(held) else held
        if column == "text" and not (
            types.is_string(text) or types.is_large_string(text) or types.is_string_view(text)
        ):
            raise RunError(f"{label}: its column 'text' holds {held} and no text")
        for batch in file.iter_batches(batch_size=256, columns=[column]):
            yield from batch.to_pylist()


def _column(label: str, names: Iterable[str]) -> str:
    for column in COLUMNS:
        if column in names:
            return column
    raise RunError(f"{label}: has no column 'text' (or 'messages'), only {', '.join(names) or 'nothing'}")


def _parsed(label: str, number: int, line: bytes) -> object:
    try:
        return json.loads(line.decode())
    except json.JSONDecodeError as error:
        raise RunError(f"{label}: row {number + 1} is no line of JSON ({error})") from error


def _row(label: str, number: int, record: object) -> Row:
    """The text or the conversation of one row; rows are counted from 1."""
    if not isinstance(record, dict):
        raise RunError(f"{label}: row {number + 1} is no JSON object")
    column = _column(f"{label}: row {number + 1}", record)
    row = record[column]
    if column == "messages":
        if not (isinstance(row, list) and row and all(isinstance(message, dict) for message in row)):
            raise RunError(f"{label}: row {number + 1} of its column 'messages' is no list of messages")
        # A table fills up with null what a message does not have, and templates ask whether it is there. Of the content
        # they ask whether it is null: beside a call of a tool there is none.
        return [
            {key: value for key, value in message.items() if value is not None or key == "content"} for message in row
        ]
    if not isinstance(row, str):
        raise RunError(f"{label}: row {number + 1} of its column 'text' is not text (null or a number)")
    try:
        row.encode()
    except UnicodeEncodeError:
        raise RunError(f"{label}: row {number + 1} holds half of a surrogate pair, which is no text") from None
    return row
