"""Tasks of lm_eval, the evaluation harness: found by name, and their data loaded."""

import contextlib
import difflib
import functools
import hashlib
import importlib.metadata
import itertools
import json
import logging
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import numpy
from huggingface_hub import constants
from huggingface_hub.errors import OfflineModeIsEnabled
from tqdm import tqdm

from . import ranks
from .errors import RunError, reason_of
from .hub import data_sets
from .hub_errors import explain_hub_error
from .progress import bar_disabled

log = logging.getLogger(__name__)

PAPER = ("boolq", "rte", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")  # AlphaPruning, table 2
SEEDS = 0, 1234  # of Python's generator and numpy's, as the harness's own command has them


@dataclass
class Tasks:
    """Tasks whose data are here.

    loaded   as lm_eval's TaskManager gives them: "tasks" and "groups" by name
    missing  task -> why it cannot be had
    limit    the first so many documents of each
    bos      the token that begins every text; None where texts begin as the tokenizer has them
    """

    loaded: dict = field(default_factory=lambda: {"tasks": {}, "groups": {}})
    missing: dict[str, str] = field(default_factory=dict)
    limit: int | None = None
    bos: int | None = None
    _dice: tuple | None = None  # the state of both generators after loading, from which every evaluation goes on

    @property
    def names(self) -> list[str]:
        return list(self.loaded["tasks"])

    @contextlib.contextmanager
    def generators(self) -> Iterator[None]:
        """Meanwhile Python's and numpy's generators go on from where loading the tasks has left them."""
        with _generators():
            random.setstate(self._dice[0])
            numpy.random.set_state(self._dice[1])
            yield

    @property
    def digest(self) -> str:
        """Of what is evaluated: a result from before counts for the same tasks alone."""
        return hashlib.sha256(json.dumps(sorted(self.names)).encode()).hexdigest()[:16]

    def leave_out(self, name: str, why: str) -> None:
        """Drop a task, and the groups that it is a part of."""
        log.warning("--tasks %s: left out, %s", name, why)
        self.missing[name] = why
        self._drop(name)

    def _drop(self, name: str) -> None:
        del self.loaded["tasks"][name]
        for key, group in list(self.loaded["groups"].items()):
            if name in [task.task_name for task in group.get_all_tasks()]:
                del self.loaded["groups"][key]


def load_tasks(
    given: Sequence[str],
    *,
    limit: int | None = None,
    bos: int | None = None,
    cache_dir: str = "llm_weights",
    streamed: bool = False,
) -> Tasks:
    """The tasks of these names, groups, tags, YAML files and folders, with their data.

    Raises RunError for a name that is unknown and for a task that cannot be run here, and where no task's data can be
    had. A task whose data alone are missing is left out, and `missing` says why.
    """
    given = [part for word in given for part in ([word] if Path(word).exists() else filter(None, word.split(",")))]
    for word in given:
        if not Path(word).exists() and (word.endswith((".yaml", ".yml")) or "/" in word):
            raise RunError(f"--tasks {word}: no such file")
    manager = _manager(tuple(given))
    names = list(dict.fromkeys(name for word in given for name in _resolve(manager, word)))
    tasks = Tasks(limit=limit, bos=bos)
    with _in_turn(), _generators():
        random.seed(SEEDS[0])
        numpy.random.seed(SEEDS[1])
        for name in names:
            definition = manager.task_index[name].cfg
            _check_members(manager, name, definition)
            _refuse(name, definition, streamed, bos)
            for found in _loaded(manager, name, cache_dir, tasks.missing):
                for task in found["tasks"].values():
                    asks = {key: task.get_config(key) for key in ("unsafe_code", "output_type")}
                    _refuse(task.task_name, asks, streamed, bos, getattr(task, "MULTIMODAL", False))
                _add(tasks, found)
        tasks._dice = random.getstate(), numpy.random.get_state()
    for others in ranks.all_gather(tasks.missing):
        tasks.missing |= others
    for name in tasks.missing.keys() & {*tasks.names}:
        tasks._drop(name)  # which some rank lacks
    if not tasks.names:
        reasons: dict[str, list[str]] = {}
        for name, why in tasks.missing.items():
            reasons.setdefault(why, []).append(name)
        said = "; ".join(f"{', '.join(names)}: {why}" for why, names in reasons.items())
        raise RunError(f"--tasks: none can be had: {said}")
    for task in tasks.loaded["tasks"].values():
        if task.get_config("num_fewshot"):
            log.info("%s: is made for %d shots; evaluated with none", task.task_name, task.get_config("num_fewshot"))
        task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=SEEDS[1])
    return tasks


@functools.cache
def _manager(given: tuple[str, ...]):
    """lm_eval's index of tasks, those in folders that are given before its own of the same name.

    To read its own takes ten seconds: not for tasks that are all given with their files.
    """
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._index import TaskIndex

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    import lm_eval.api.task as api

    api.tqdm = lambda *args, **options: tqdm(*args, **options | {"disable": bar_disabled()})  # it asks no setting
    folders = [Path(word).resolve() for word in given if Path(word).is_dir()]
    files = [Path(word) for word in given if Path(word).is_file()]
    own = dict.fromkeys(path.resolve() for path in [*files, *itertools.chain(*map(_definitions, folders))])
    definitions = {path: _yaml(path) for path in own}
    _check_names(definitions)
    named = len(folders) + len(files) < len(given) or any("group" in one for one in definitions.values())
    if named:
        log.info("lm_eval %s: reading its list of tasks", importlib.metadata.version("lm_eval"))
    manager = TaskManager(include_path=folders or None, include_defaults=named)
    for path in files:  # by name, as those of folders are; by its path the harness takes no group
        definition = definitions[path.resolve()]
        manager.task_index.pop(_name(path, definition), None)
        TaskIndex.process_cfg(definition, path, manager.task_index)
    return manager


def _check_names(definitions: dict[Path, dict]) -> None:
    """Raises RunError where two files define one name: of which the harness takes any."""
    known: dict[str, Path] = {}
    for path, definition in definitions.items():
        name = _given_name(definition)
        if isinstance(name, str) and known.setdefault(name, path) != path:
            raise RunError(f"--tasks: {known[name]} and {path} both define '{name}'; name one")


def _given_name(definition: dict) -> object:
    """What a definition calls its group or task; no text where it names none."""
    return definition.get("group") or definition.get("task")


def _definitions(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.yaml"))


def _yaml(path: Path) -> dict:
    """A task's definition. Raises RunError where it is none that can be read."""
    from lm_eval.tasks._yaml_loader import load_yaml

    try:
        return load_yaml(path, resolve_func=False)
    except Exception as error:  # of yaml, of the file system and of the harness
        raise RunError(f"--tasks {path}: {reason_of(error)}") from error


def _name(path: Path, definition: dict) -> str:
    """Of the group or the task that a file defines. Raises RunError where it defines none."""
    name = _given_name(definition)
    if not isinstance(name, str):
        raise RunError(f"--tasks {path}: names no task (`task: NAME`) and no group")
    return name


def _resolve(manager, word: str) -> list[str]:
    """The names in the index that one word of --tasks stands for."""
    path = Path(word)
    if path.is_dir():
        found = [_yaml(file) for file in _definitions(path)]
        names = [one["task"] for one in found if isinstance(one.get("task"), str)]
        names = names or [one["group"] for one in found if isinstance(one.get("group"), str)]
        if not names:
            raise RunError(f"--tasks {word}: holds no task (a .yaml with `task: NAME`)")
        return names
    if path.is_file():
        return [_name(path, _yaml(path))]
    if word in manager.all_tags:
        return sorted(manager.task_index[word].tags)
    if word in manager.task_index:
        return [word]
    raise _unknown(manager, "--tasks", word)


def _check_members(manager, name: str, definition: dict) -> None:
    """Raises RunError for a group, of the name in --tasks, that has a member which is defined nowhere."""
    members = definition.get("task")
    for member in members if isinstance(members, list) else []:
        if isinstance(member, dict) and "task" in member and not isinstance(member["task"], str):
            _check_members(manager, name, member)  # a group within the group
        elif isinstance(member, str) and member not in manager.task_index:
            raise _unknown(manager, f"--tasks {name}", member)
        elif isinstance(member, str):
            _check_members(manager, name, manager.task_index[member].cfg or {})


def _unknown(manager, where: str, word: str) -> RunError:
    near = difflib.get_close_matches(word, manager.all_tasks, n=3)
    guess = f"did you mean {' or '.join(map(repr, near))}?" if near else "no name is near;"
    return RunError(f"{where}: '{word}' is unknown; {guess} `lm_eval ls tasks` lists all")


def _refuse(name: str, definition: dict, streamed: bool, bos: int | None, multimodal: bool = False) -> None:
    """Raises RunError for a task that is not for a run of this kind, whatever its data."""
    if definition.get("unsafe_code"):
        raise RunError(f"--tasks {name}: runs programs that the model writes; that is for lm_eval's own command")
    if multimodal:
        raise RunError(f"--tasks {name}: needs images or sound, which the model does not take")
    unfit = "--add_bos every" if bos is not None else "--stream" if streamed else ""
    if unfit and definition.get("output_type") == "generate_until":
        raise RunError(f"--tasks {name}: has the model write, and {unfit} is for log-likelihoods; leave one out")


def _loaded(manager, name: str, cache_dir: str, missing: dict[str, str]) -> list[dict]:
    """What the manager makes of a name; of a group that it cannot make, each member that it can, without the group.
    `missing` says why of the others.
    """
    entry = manager.task_index[name]
    found, why = _load(manager, name, entry, cache_dir)
    if found:
        return [found]
    members, apart = entry.cfg.get("task"), []
    if not isinstance(members, list):
        missing[name] = why
        return []
    for member in members:
        label = member if isinstance(member, str) else str(member.get("task") or member.get("group"))
        own = {key: value for key, value in entry.cfg.items() if key != "aggregate_metric_list"}
        alone = replace(entry, yaml_path=None, cfg={**own, "task": [member]})
        found, why = _load(manager, name, alone, cache_dir, label)
        if found:
            apart.append({"tasks": found["tasks"]})
        elif isinstance(member, str) and not _overrides(entry.cfg) and _is_group(manager, member):
            apart += [{"tasks": one["tasks"]} for one in _loaded(manager, member, cache_dir, missing)]
        else:
            missing[label] = why
    return apart


def _load(manager, name: str, entry, cache_dir: str, member: str | None = None) -> tuple[dict | None, str]:
    """What the manager makes of `entry` under that name, or None and why not; with one member, that one's reason."""
    definition, known = entry.cfg or {}, manager.task_index[name]
    if member in manager.task_index:
        definition = manager.task_index[member].cfg or {}
    manager.task_index[name] = entry
    try:
        with data_sets(cache_dir, name) as failed:
            try:
                return manager.load([name]), ""
            except Exception as error:  # a task is a program of its own, and so is what reads its data
                return None, failure_reason(error, failed, definition.get("dataset_path"))
    finally:
        manager.task_index[name] = known


def _is_group(manager, name: str) -> bool:
    return name in manager.task_index and isinstance((manager.task_index[name].cfg or {}).get("task"), list)


def _overrides(definition: dict) -> set[str]:
    """What a group changes of its members."""
    from lm_eval.config.group import GroupConfig

    return definition.keys() - {item.name for item in fields(GroupConfig)}


def _add(tasks: Tasks, found: dict) -> None:
    """Take what was loaded, each task once. Raises RunError where two differ under one name."""
    for name, task in found["tasks"].items():
        known = tasks.loaded["tasks"].setdefault(name, task)
        if known is not task and known.dump_config() != task.dump_config():
            raise RunError(f"--tasks: two of them define '{name}' differently; name one")
    tasks.loaded["groups"] |= found.get("groups", {})


def failure_reason(error: Exception, failed: Sequence[BaseException] = (), data_set: object = None) -> str:
    """Why a task cannot be had, in one line; `failed` are the requests to the hub that did."""
    if constants.HF_HUB_OFFLINE and isinstance(error, ConnectionError):
        error = OfflineModeIsEnabled()
    for one in [*reversed(failed), error]:
        if isinstance(data_set, str) and (said := explain_hub_error(one, data_set, "task")):
            return "; ".join(filter(None, said))
    if isinstance(error, StopIteration):  # of the first document
        return "its data hold no documents"
    kind = "" if isinstance(error, (OSError, ImportError, RuntimeError, ValueError)) else f"{type(error).__name__}: "
    return f"{kind}{reason_of(error)}"


@contextlib.contextmanager
def _in_turn() -> Iterator[None]:
    """The first rank before the others, which then find in the cache what it has fetched."""
    if not ranks.is_main():
        ranks.barrier()
    try:
        yield
    finally:
        if ranks.is_main():
            ranks.barrier()


@contextlib.contextmanager
def _generators() -> Iterator[None]:
    """Meanwhile Python's and numpy's generators are the harness's; afterwards they go on where they were."""
    before = random.getstate(), numpy.random.get_state()
    try:
        yield
    finally:
        random.setstate(before[0])
        numpy.random.set_state(before[1])
