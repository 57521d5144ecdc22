"""What is kept from run to run, keyed by what it depends on: metric values, one JSON file a metric, written as it
grows; and the text that a model has written.
"""

import hashlib
import json
import logging
import time
from pathlib import Path

import numpy
import torch
from torch import Tensor

from .. import ranks
from ..config import RunConfig
from ..errors import RunError
from ..model import LanguageModel
from .files import write_text

log = logging.getLogger(__name__)

METRICS_FOLDER, TEXTS_FOLDER = "ww_metric", "sampled_text"  # in --cache_dir
SECONDS = 1.0  # between writes of a growing file: what a killed analysis loses at most


def metric_folder(config: RunConfig, model: LanguageModel) -> Path:
    """The folder of the run's metric values; where none is named, one of this model's own."""
    return Path(config.ww_metric_cache or Path(config.cache_dir) / METRICS_FOLDER / model.digest[:16])


class MetricCache:
    """What was measured of each matrix of one model, under the names of its entries (a metric, or its pictures).

    A file of another model is refused. A bare <metric>.npy in the published format (one float a matrix, in module
    order) is accepted with a warning, which is appended to `events`.
    """

    def __init__(self, folder: Path, model: LanguageModel, events: list[dict] | None = None):
        self.folder, self.model, self.events = Path(folder), model, [] if events is None else events
        self._files: dict[str, dict] = {}  # entry -> the contents of its file
        self._grown: set[str] = set()  # entries with values that are not on disk yet
        self._written = time.monotonic()

    def read(self, entry: str, version: int) -> dict:
        """The values of `entry` by matrix name, as far as they are there. Raises RunError for a file that cannot be
        read, and for one of another model; values of an earlier definition are as good as none.
        """
        path = self.folder / f"{entry}.json"
        values = self._read_json(path, version) if path.is_file() else self._read_array(self.folder / f"{entry}.npy")
        header = {"metric": entry, "version": version, "model": self.model.name, "digest": self.model.digest}
        self._files[entry] = {**header, "values": values}
        if len(values) == len(self.model.matrices):
            log.info("%s: read from %s", entry, self.folder)
        elif values:
            log.info("%s: resuming after %d of %d matrices", entry, len(values), len(self.model.matrices))
        return dict(values)

    def add(self, matrix: str, values: dict) -> None:
        """Keep {entry: value} of one matrix; a second later at most it is on disk."""
        for entry, value in values.items():
            self._files[entry]["values"][matrix] = value
            self._grown.add(entry)
        if time.monotonic() - self._written > SECONDS:
            self.write()

    def write(self) -> None:
        """Write new values to disk."""
        for entry in sorted(self._grown):
            write_text(self.folder / f"{entry}.json", json.dumps(self._files[entry], indent=1) + "\n")
        self._grown.clear()
        self._written = time.monotonic()

    def _read_json(self, path: Path, version: int) -> dict:
        try:
            cache = json.loads(path.read_text(encoding="utf-8"))
            digest, found, values = cache["digest"], cache["version"], dict(cache["values"])
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise RunError(f"--WW_metric_cache {self.folder}: {path.name} is not a metric cache; remove it") from error
        if digest != self.model.digest:
            raise RunError(
                f"--WW_metric_cache {self.folder}: {path.name} holds the values of another model or other weights "
                f"({cache.get('model', '?')}); name another folder"
            )
        known = {matrix.name for matrix in self.model.matrices}
        return values if found == version and set(values) <= known else {}

    def _read_array(self, path: Path) -> dict[str, float]:
        if not path.is_file():
            return {}
        names = [matrix.name for matrix in self.model.matrices]
        try:
            values = numpy.load(path, allow_pickle=False)
            if not isinstance(values, numpy.ndarray):
                raise ValueError("an archive")
        except (ValueError, OSError, EOFError) as error:
            raise RunError(f"--WW_metric_cache {self.folder}: {path.name} is not a plain array of numbers") from error
        if (
            values.shape != (len(names),)
            or not numpy.issubdtype(values.dtype, numpy.number)
            or not numpy.isfinite(values).all()
        ):
            raise RunError(
                f"--WW_metric_cache {self.folder}: {path.name} has shape {values.shape}, not {len(names)} finite "
                f"numbers, one for each prunable matrix of {self.model.name}"
            )
        message = f"{path} is used as it is: nothing in it says which model or metric its {len(names)} values belong to"
        log.warning(message)
        self.events.append({"matrix": None, "message": message})
        return dict(zip(names, values.tolist(), strict=True))


def _text_path(config: RunConfig, settings: dict) -> Path:
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    return Path(config.cache_dir) / TEXTS_FOLDER / f"{key}.json"


def load_sampled_windows(config: RunConfig, settings: dict) -> Tensor | None:
    """The windows (n, seqlen) that a model has written with these settings, if there are any."""
    path = _text_path(config, settings)
    try:
        cache = ranks.from_main(lambda: json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None)
        if cache is None or cache["settings"] != settings:
            return None
        return torch.tensor(cache["windows"], dtype=torch.int64).view(-1, settings["seqlen"])
    except (ValueError, KeyError, TypeError, OSError, RuntimeError) as error:
        raise RunError(f"--cache_dir {config.cache_dir}: {path} is not a model's text; remove it") from error


def save_sampled_windows(config: RunConfig, settings: dict, windows: Tensor) -> None:
    """Put the windows where `load_sampled_windows` finds them."""
    write_text(_text_path(config, settings), json.dumps({"settings": settings, "windows": windows.tolist()}) + "\n")
