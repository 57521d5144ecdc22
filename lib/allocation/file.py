"""Sparsities out of a file: those of an earlier run, of another tool, or of one's own."""

import csv
import difflib
import fnmatch
import io
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import RunError
from ..options import Option
from .base import Problem, allocation
from .budget import S_MAX, S_MIN

COLUMNS = ("target_sparsity", "sparsity")  # of a table with a header, the first that it has
APART = 0.01  # what a table's two columns may differ by: the second is what pruning came to
ROUNDING = 1e-3  # between --sparsity_ratio and the file's mean


@dataclass(frozen=True)
class Entries:
    """What a file says, in its order: a matrix's name, a pattern of names or a block's number, and a sparsity."""

    path: Path = field(repr=False, compare=False)
    sparsities: tuple[tuple[str, float], ...]
    flag: str = field(default="--sparsities", repr=False, compare=False)

    def error(self, message: str) -> RunError:
        return RunError(f"{self.flag} {self.path}: {message}".lstrip())


def read_entries(path: str, flag: str = "--sparsities") -> Entries:
    """The entries of a .json object or a .csv table, such as a run's layers.csv, which the run's folder stands for.
    Messages name the file as what `flag` gave.

    Raises RunError for a file that is neither, a name that is given twice, and a sparsity out of bounds.
    """
    file = Path(path) / "layers.csv" if Path(path).is_dir() else Path(path)
    read = {".json": _of_json, ".csv": _of_csv}.get(file.suffix)
    refused = Entries(file, (), flag).error
    if not file.is_file():
        raise refused("no such file" + (f"; {path} is no run's folder" if Path(path).is_dir() else ""))
    if read is None:
        raise refused("is neither a .json nor a .csv")
    try:
        found = read(file.read_text(encoding="utf-8-sig").strip(), refused)
    except (OSError, ValueError, csv.Error) as error:
        raise refused(f"cannot be read: {error}") from error
    known: dict[str, float] = {}
    for key, value in found:
        if key in known:
            raise refused(f"'{key}' is given twice")
        known[key] = _sparsity(key, value, refused)
    if not known:
        raise refused("holds no sparsity")
    return Entries(file, tuple(known.items()), flag)


def _of_json(text: str, refused: Callable) -> list[tuple[str, object]]:
    pairs = json.loads(text or "null", object_pairs_hook=list)  # a name that is given twice is seen
    if not text.startswith("{"):
        raise refused("is no JSON object of names and sparsities")
    return pairs


def _of_csv(text: str, refused: Callable) -> list[tuple[str, object]]:
    """Rows of a name and a sparsity, or with a header that names such columns."""
    rows = [row for row in csv.reader(io.StringIO(text)) if any(cell.strip() for cell in row)]
    header = [cell.strip().lower() for cell in rows[0]] if rows else []
    if "name" in header:
        column = next((header.index(one) for one in COLUMNS if one in header), None)
        if column is None:
            raise refused(f"has no column {' or '.join(COLUMNS)}: only {', '.join(header)}")
        places, rows = (header.index("name"), column), rows[1:]
    else:
        places = (0, 1)
        if surplus := next((row for row in rows if len(row) > 2), None):
            raise refused(f"has a row of {len(surplus)} cells and no header with a column name: {', '.join(surplus)}")
    if short := next((row for row in rows if len(row) <= max(places)), None):
        raise refused(f"has a row without a sparsity: {', '.join(short)}")
    if set(COLUMNS) <= set(header):
        _check_columns(rows, header, refused)
    return [(row[places[0]].strip(), row[places[1]].strip()) for row in rows]


def _check_columns(rows: list[list[str]], header: list[str], refused: Callable) -> None:
    """Raises RunError where one of a table's two sparsities was changed and not the other."""
    for row in rows:
        if len(row) < len(header):
            continue
        name, *values = (row[header.index(column)].strip() for column in ("name", *COLUMNS))
        numbers = [_sparsity(name, value, refused) for value in values if value]
        if len(numbers) == 2 and abs(numbers[0] - numbers[1]) > APART:
            raise refused(
                f"'{name}' has {COLUMNS[0]} {numbers[0]:g}, which is read, and {COLUMNS[1]} {numbers[1]:g}; leave one "
                "of the columns out"
            )


def _sparsity(key: str, value: object, refused: Callable) -> float:
    try:
        number = float(value) if isinstance(value, (int, float, str)) and not isinstance(value, bool) else None
    except ValueError:
        number = None
    if number is None:
        said = "a list or an object" if isinstance(value, list) else json.dumps(value)
        raise refused(f"'{key}' has {said}, which is no number")
    if not S_MIN <= number <= S_MAX:
        raise refused(f"'{key}' has {number:g}; a sparsity must lie in [{S_MIN:g}, {S_MAX:g}]")
    return number


SPARSITIES = Option(
    "sparsities", None, "the sparsities of *_file: a .json object or a .csv table of matrix name, pattern of names "
    "(such as *.down_proj) or block number, and sparsity; of entries for one matrix the last counts; layers.csv of an "
    "earlier run, or its folder, is such a file, of which target_sparsity is read", read=read_entries,
)  # fmt: skip


@allocation("file", options=(SPARSITIES,), given=True)
def file(problem: Problem) -> dict[str, float]:
    """Each matrix as --sparsities says. Raises RunError for an entry that decides nothing, and a matrix without one."""
    entries: Entries = problem.options["sparsities"]
    covered, decided_by = {}, {}
    given = dict(entries.sparsities)
    for key in given:
        covered[key] = _covered(key, problem, entries)
        decided_by |= dict.fromkeys(covered[key], key)
    for key in covered.keys() - set(decided_by.values()):
        later = decided_by[covered[key][0]]
        raise entries.error(f"'{key}' is overridden by '{later}' after it; leave it out, or put it later")
    if missing := [name for name in problem.sizes if name not in decided_by]:
        raise entries.error(f"says nothing of {len(missing)} of {len(problem.sizes)} matrices, such as {missing[0]}")
    found = {name: given[decided_by[name]] for name in problem.sizes}
    mean = problem.mean(found)
    if problem.sparsity is not None and abs(mean - problem.sparsity) > ROUNDING:
        raise RunError(
            f"--sparsity_ratio {problem.sparsity:g}: contradicts --sparsities {entries.path}, whose mean is "
            f"{mean:.4f}; leave the ratio out"
        )
    return found


def _covered(key: str, problem: Problem, entries: Entries) -> list[str]:
    """The matrices that an entry is for."""
    if key in problem.sizes:
        return [key]
    if key.removeprefix("-").isdecimal():
        if found := [name for name, block in problem.blocks.items() if block == int(key)]:
            return found
        raise entries.error(f"block {key} has no prunable matrix; blocks go from 0 to {max(problem.blocks.values())}")
    if found := fnmatch.filter(problem.sizes, key):
        return found
    near = difflib.get_close_matches(key, problem.sizes, n=1)
    hint = f"; did you mean '{near[0]}'?" if near else f", which are called like {next(iter(problem.sizes))}"
    raise entries.error(f"'{key}' is none of the model's prunable matrices{hint}")
