"""The Hugging Face hub: what is fetched from it, how long it is waited for, and where it is kept.

Nothing else here asks the hub for anything, but `datasets` inside `data_sets`. A model becomes a local folder before a
library reads it, a data set local files, all in huggingface_hub's cache under --cache_dir, so that a later run finds
them without a network. What may pass (a cut connection, a timeout, 429, 5xx) is tried again until nothing has moved for
PATIENCE seconds, with a line in the log; what may not is a RunError that says what happened and what to do.
"""

import errno
import functools
import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants, errors
from huggingface_hub.utils import WeakFileLock, get_session, hf_raise_for_status, httpx
from tqdm import tqdm
from transformers import dynamic_module_utils

from .checkpoints import ADAPTER, WEIGHTS, read_index
from .errors import RunError
from .hub_errors import HubError, endpoint, explain, wait_asked_for
from .progress import bar_disabled

log = logging.getLogger(__name__)

PATIENCE = 15.0  # seconds without a byte after which a fetch is given up
ANSWER = 10.0  # seconds that one request may take to be answered, or to go on
PAUSE = 1.0  # seconds before the first further attempt; twice as many before each that follows
PASSING = (408, 429, 500, 502, 503, 504)

SMALL = ("*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken")  # at the top: configurations and tokenizers
UNWRITABLE = (errno.EACCES, errno.EDQUOT, errno.EFBIG, errno.ENOSPC, errno.ENOTDIR, errno.EPERM, errno.EROFS)

# What would wait, try again or write to ~/.cache by rules of its own, unseen from here.
constants.HF_HUB_DISABLE_TELEMETRY = True
if "HF_HUB_DISABLE_XET" not in os.environ:
    constants.HF_HUB_DISABLE_XET = True


@dataclass(frozen=True)
class Repository:
    """`name` on the hub, of the `kind` "model" or "dataset"; `label` is the flag that wants it, with its value."""

    name: str
    kind: str
    cache_dir: str
    label: str


@dataclass(frozen=True)
class Snapshot:
    """A repository at one commit: its files' names, and the folder in the cache where those that were fetched lie.

    Where the hub could not be asked, the names are those of the files in the cache, and `trouble` says why.
    """

    repository: Repository
    commit: str
    folder: Path
    names: frozenset[str]
    trouble: str = ""


def fetch_model(repository: Repository, code: bool = False) -> Snapshot:
    """A model's configuration and tokenizer (and with `code` its Python files), fetched or from the cache; no weight.

    Raises RunError where they are in neither place.
    """
    cached = _cached(repository, "config.json")
    try:
        with _asking(repository, patience=0 if cached else None):
            info = huggingface_hub.HfApi(endpoint=endpoint()).repo_info(
                repository.name, repo_type=repository.kind, timeout=ANSWER
            )
    except HubError as error:
        if cached is None:
            raise
        log.info("%s: %s; going on with what is in %s", repository.name, error.what, repository.cache_dir)
        names = (str(path.relative_to(cached.parent)) for path in cached.parent.rglob("*") if path.is_file())
        return Snapshot(repository, cached.parent.name, cached.parent, frozenset(names), error.what)
    names = frozenset(sibling.rfilename for sibling in info.siblings)
    if "config.json" not in names:
        raise RunError(f"{repository.label}: {_no_config(names)}")
    top = (name for name in names if "/" not in name and any(fnmatch(name, like) for like in SMALL))
    files = {name for name in top if name != "config.json" and not name.endswith(".index.json")}
    _fetch_all(repository, files | {name for name in names if code and name.endswith(".py")}, info.sha)
    # Last, and by the branch: where the cache has it, it has the others, and remembers the branch's commit.
    folder = fetch(repository, "config.json").parent
    for other in _code_elsewhere(folder) - {repository.name} if code else ():
        _fetch_code(replace(repository, name=other))
    return Snapshot(repository, folder.name, folder, names)


def _code_elsewhere(folder: Path) -> set[str]:
    """The repositories whose code a model's configuration or tokenizer names, as in "owner/name--module.Class"."""
    found = set()
    for file in filter(Path.is_file, (folder / "config.json", folder / "tokenizer_config.json")):
        with suppress(ValueError, AttributeError):  # what is no configuration is said where it is read
            references = json.dumps(json.loads(file.read_text()).get("auto_map"))
            found |= set(re.findall(r'"([^"]+?)--[^"]+"', references))
    return found


def _fetch_code(repository: Repository) -> None:
    with _asking(repository):
        info = huggingface_hub.HfApi(endpoint=endpoint()).repo_info(repository.name, timeout=ANSWER)
    for sibling in info.siblings:
        if sibling.rfilename.endswith(".py"):
            fetch(repository, sibling.rfilename)


def set_code_cache(cache_dir: str) -> None:
    """Have transformers put the code of models, which it copies before it runs it, under the cache and not ~/.cache."""
    if "HF_MODULES_CACHE" not in os.environ:
        dynamic_module_utils.HF_MODULES_CACHE = str(Path(cache_dir).absolute() / "modules")


@contextmanager
def data_sets(cache_dir: str, name: str) -> Iterator[list[BaseException]]:
    """Meanwhile `datasets`, where a library has it fetch what it wants itself, asks the hub that the environment names,
    as patiently as all else here, and keeps what it fetches under the cache, or in HF_DATASETS_CACHE where that is set.

    Yields what requests to the hub failed with, which `datasets` leaves out of its own errors. `name` is for the log.
    """
    from datasets import config  # takes a second to import, and other runs do without

    folder = Path(cache_dir).absolute()
    kept = Path(os.environ.get("HF_DATASETS_CACHE", folder / "datasets"))
    changed = [
        (config, "HF_ENDPOINT", endpoint()),
        (config, "HF_HUB_OFFLINE", constants.HF_HUB_OFFLINE), (config, "HF_UPDATE_DOWNLOAD_COUNTS", False),
        (config, "USE_PARQUET_EXPORT", False),  # it is asked of another host, for what the data themselves say
        (config, "HF_DATASETS_CACHE", kept), (config, "DOWNLOADED_DATASETS_PATH", kept / "downloads"),
        (constants, "HF_HUB_CACHE", str(folder)),
    ]  # fmt: skip
    session, failed = get_session(), []

    def send(request: httpx.Request, **options) -> httpx.Response:
        try:
            return _Watch(name, "its data", PATIENCE).send(own, request, **options)
        except _GaveUpError as error:
            failed.append(error.__cause__)
            raise

    own, session.send = session.send, send
    with ExitStack() as stack:
        stack.callback(delattr, session, "send")
        for module, setting, value in changed:
            stack.callback(setattr, module, setting, getattr(module, setting))
            setattr(module, setting, value)
        yield failed


@contextmanager
def offline() -> Iterator[None]:
    """Meanwhile a library that would ask the hub of its own accord finds what it wants in the cache, or not at all."""
    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def fetch_weights(snapshot: Snapshot) -> None:
    """A model's weight files into its folder: safetensors where it has any, else `.bin`.

    Raises RunError where it has none, or where they can neither be fetched nor are in the cache.
    """
    cached = f"not in {snapshot.repository.cache_dir}, and {snapshot.trouble}" if snapshot.trouble else None
    try:
        named = json.loads((snapshot.folder / "config.json").read_text()).get("transformers_weights")
    except (ValueError, AttributeError) as error:
        raise RunError(f"{snapshot.repository.label}: its config.json is no configuration: {error}") from error
    accepted = [named] if named else WEIGHTS
    found = next((name for name in accepted if name in snapshot.names), None)
    if found is None:
        where = cached and f"its weights are {cached}"
        where = where or _gguf(snapshot.names) or f"its weights are none of {', '.join(accepted)}"
        raise RunError(f"{snapshot.repository.label}: {where}")
    _fetch_all(snapshot.repository, [found], snapshot.commit)
    if found.endswith(".index.json"):
        _, shards = read_index(snapshot.folder / found, snapshot.repository.label)
        if missing := sorted(shards - snapshot.names):
            where = cached or "not in the repository"
            raise RunError(f"{snapshot.repository.label}: {missing[0]}, which {found} names, is {where}")
        _fetch_all(snapshot.repository, shards, snapshot.commit)


def fetch_data(repository: Repository, file: str, revision: str = "main") -> Path:
    """A file of a data set; from the cache, without asking, where it was fetched before. Raises RunError."""
    return _cached(repository, file, revision) or fetch(repository, file, revision)


def fetch(repository: Repository, file: str, revision: str = "main") -> Path:
    """A file of a repository, in the cache. Raises RunError."""
    with _asking(repository, file) as watch:
        return _download(repository, file, revision, endpoint=endpoint(), etag_timeout=ANSWER, tqdm_class=_bar(watch))


def _fetch_all(repository: Repository, names: Iterable[str], commit: str) -> None:
    for name in sorted(names):
        fetch(repository, name, commit)  # asks nothing where it is in the cache


def _cached(repository: Repository, file: str, revision: str = "main") -> Path | None:
    try:
        return _download(repository, file, revision, local_files_only=True)
    except (OSError, ValueError):  # not there; or no name at all, which the question to the hub says better
        return None


def _download(repository: Repository, file: str, revision: str, **options) -> Path:
    options |= {"repo_type": repository.kind, "revision": revision, "cache_dir": repository.cache_dir}
    return Path(huggingface_hub.hf_hub_download(repository.name, file, **options))


def _gguf(names: frozenset[str]) -> str | None:
    """What to do with a repository that holds GGUF files."""
    files = sorted(name for name in names if name.endswith(".gguf"))
    return f"holds GGUF files; fetch one of them, such as {files[0]}, and give its path" if files else None


def _no_config(names: frozenset[str]) -> str:
    if not names.isdisjoint(ADAPTER):
        return "is an adapter and no model; merge it into its base model, save that, and give the folder"
    return _gguf(names) or "has no config.json, so it is no model of transformers"


def _bar(watch: "_Watch") -> type[tqdm]:
    """The bar of a download, which huggingface_hub makes when the first bytes are about to come."""

    class Bar(tqdm):
        def __init__(self, *args, desc: str = "", total: int | None = None, **options):
            size = "" if total is None else f" ({tqdm.format_sizeof(total)}B)"
            log.info("%s: fetching %s%s", watch.name, watch.file, size)
            watch.began = True
            super().__init__(*args, desc=desc, total=total, **options | {"disable": bar_disabled()})

    return Bar


class _GaveUpError(Exception):
    """Of no kind that huggingface_hub would try again. Its cause is what the last attempt came to."""


class _Watch:
    """The requests of one fetch, each tried again while fewer than `patience` seconds have passed without a byte."""

    def __init__(self, name: str, file: str, patience: float):
        self.name, self.file, self.patience = name, file, patience
        self.moved, self.furthest, self.attempts = time.monotonic(), 0, 0
        self.answered = self.began = False

    def send(self, send: Callable, request: httpx.Request, **options) -> httpx.Response:
        """In place of the `send` of huggingface_hub's session."""
        pause = PAUSE
        if self.began:
            log.info("%s: the download of %s broke off; going on", self.name, self.file)
        while True:
            left = self.moved + self.patience - time.monotonic() if self.attempts else ANSWER
            if left <= 0:
                raise _GaveUpError from httpx.ReadTimeout("the download stalled", request=request)
            self.attempts += 1
            request.extensions["timeout"] = dict.fromkeys(("connect", "read", "write", "pool"), min(ANSWER, left))
            try:
                response = send(request, **options)
                self.answered = True
                if response.status_code not in PASSING:
                    if options.get("stream"):
                        first = re.search(r"bytes (\d+)-", response.headers.get("content-range", ""))
                        response.stream = _Moving(response.stream, self, int(first[1]) if first else 0)
                    return response
                hf_raise_for_status(response)
            except httpx.UnsupportedProtocol as error:
                raise _GaveUpError from error
            except (httpx.ProxyError, httpx.ConnectError, httpx.ConnectTimeout) as error:
                if not self.answered:  # there is no way to the hub, and waiting makes none
                    raise _GaveUpError from error
                trouble, wait = error, pause
            except httpx.TransportError as error:
                trouble, wait = error, pause
            except errors.HfHubHTTPError as error:
                error.response.close()
                trouble, wait = error, max(pause, wait_asked_for(error.response))
            if time.monotonic() + wait > self.moved + self.patience:
                raise _GaveUpError from trouble
            log.info("%s: %s; trying again", self.name, explain(trouble, self.name)[0])
            time.sleep(wait)
            pause *= 2


class _Moving(httpx.SyncByteStream):
    """The bytes of a file from `position` on. Those that no earlier attempt came to are what moves."""

    def __init__(self, stream: httpx.SyncByteStream, watch: _Watch, position: int):
        self._stream, self._watch, self._position = stream, watch, position

    def __iter__(self) -> Iterator[bytes]:
        for part in self._stream:
            self._position += len(part)
            if self._position > self._watch.furthest:
                self._watch.furthest, self._watch.moved = self._position, time.monotonic()
            yield part

    def close(self) -> None:
        self._stream.close()


@contextmanager
def _locks_in_the_log(watch: _Watch) -> Iterator[None]:
    """huggingface_hub waits without a word, or an end, while another process fetches the same file."""
    locks, handler = logging.getLogger(WeakFileLock.__module__), logging.Handler()
    handler.emit = lambda record: log.info("%s: another process is fetching %s; waiting", watch.name, watch.file)
    handler.addFilter(lambda record: "waiting" in record.getMessage())
    before = locks.level, locks.propagate
    locks.addHandler(handler)
    locks.setLevel(logging.INFO)
    locks.propagate = False
    try:
        yield
    finally:
        locks.removeHandler(handler)
        locks.setLevel(before[0])
        locks.propagate = before[1]


@contextmanager
def _asking(repository: Repository, file: str = "", patience: float | None = None) -> Iterator[_Watch]:
    """Around calls of huggingface_hub: its session is watched, and what fails is a RunError."""
    watch, session = _Watch(repository.name, file, PATIENCE if patience is None else patience), get_session()
    session.send = functools.partial(watch.send, session.send)
    try:
        with _locks_in_the_log(watch):
            yield watch
    except Exception as error:  # of httpx, huggingface_hub and the file system: they have no common base class
        if getattr(error, "errno", None) in UNWRITABLE:
            raise RunError(f"--cache_dir {repository.cache_dir}: cannot be written: {error.strerror}") from error
        raise HubError(repository.label, *explain(error, repository.name, repository.kind)) from error
    finally:
        del session.send
