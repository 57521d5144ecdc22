"""Zero-shot accuracies: a model evaluated on tasks of lm_eval, the evaluation harness."""

import contextlib
import importlib.metadata
import io
import logging
import math
from collections.abc import Callable

import numpy
import torch

from .activations import Store
from .attention import without_cudnn_attention
from .errors import RunError
from .harness_tasks import Tasks, failure_reason
from .model import LanguageModel

log = logging.getLogger(__name__)

METRIC = "acc"  # what the paper averages; where a task also has acc_norm, that is by the answers' lengths in bytes


@without_cudnn_attention()
def evaluate(
    model: LanguageModel,
    tasks: Tasks,
    batch: Callable[[int], int],
    *,
    store: Store | None = None,
    what: str = "zero-shot",
) -> dict:
    """{"tasks": {name: {metric: value}}, "groups": likewise, "documents": {name: {"effective": evaluated, "original":
    of so many}}, "cut": requests that are longer than the model's window, and lost their beginning}. A task with a
    request that cannot be scored has no result; `tasks.missing` says why.

    Metrics have the harness's names, and beside each lies <metric>_stderr (None where there is none). batch(length) is
    how many requests of so many tokens one batch takes. On every rank the same.
    """
    from .harness import HarnessModel

    seen, found = HarnessModel(model, batch, bos=tasks.bos, store=store, what=what), None
    while tasks.names and found is None:
        failed = {}
        try:
            found = _evaluated(seen, tasks, tasks.loaded)
        except (RunError, torch.OutOfMemoryError, MemoryError):
            raise
        except Exception:  # a task is a program of its own
            if seen.computing:
                raise
            failed = _failures(seen, tasks)
            if not (failed | seen.failed).keys() & {*tasks.names}:
                raise
        for name, why in (failed | seen.failed).items():
            if name in tasks.names:
                tasks.leave_out(name, why)
    if seen.cut:
        log.warning("%s: %d requests are longer than the model's window and lose their beginning", what, seen.cut)
    results = {name: _metrics(values) for name, values in found["results"].items()} if found else {}
    return {
        "tasks": {name: results[name] for name in tasks.names},
        "groups": {name: results[name] for name in tasks.loaded["groups"] if results.get(name)},
        "documents": {name: dict(found["n-samples"][name]) for name in tasks.names},
        "cut": seen.cut,
    }


def _evaluated(seen, tasks: Tasks, loaded: dict) -> dict:
    """The harness's results of the loaded tasks and groups."""
    from lm_eval.evaluator import evaluate as evaluate_tasks

    with tasks.generators(), contextlib.redirect_stdout(io.StringIO()):  # it prints what it is at
        return evaluate_tasks(lm=seen, task_dict=loaded, limit=tasks.limit, log_samples=False)


def _failures(seen, tasks: Tasks) -> dict[str, str]:
    """The tasks that fail when each is evaluated alone, with their reasons; what the model has answered it keeps."""
    failed = {}
    for name, task in tasks.loaded["tasks"].items():
        if name not in seen.failed:
            try:
                _evaluated(seen, tasks, {"tasks": {name: task}, "groups": {}})
            except (RunError, torch.OutOfMemoryError, MemoryError):
                raise
            except Exception as error:
                failed[name] = failure_reason(error)
    return failed


def record(tasks: Tasks, **found: dict | None) -> dict:
    """The `zero_shot` of run.json, from what `evaluate` found at two stages, the first of them perhaps not asked for:
    dense and pruned, or before and after.
    """
    last = found[list(found)[-1]]

    def both(what: Callable[[dict], dict | float | None]) -> dict:
        return {stage: one and what(one) for stage, one in found.items()}

    entries = {}
    for name, task in tasks.loaded["tasks"].items():
        count = last["documents"][name]
        entries[name] = {
            "version": task.VERSION, "documents": count["effective"], "of": count["original"],
            **both(lambda found, name=name: found["tasks"].get(name)),
        }  # fmt: skip
    groups = {name: both(lambda found, name=name: found["groups"].get(name)) for name in last["groups"]}
    counted = [name for name in entries if accuracy(last["tasks"][name]) is not None]
    return {
        "harness": f"lm_eval {importlib.metadata.version('lm_eval')}",
        "shots": 0,
        "stages": list(found),
        "limit": tasks.limit,
        "tasks": entries,
        "groups": groups,
        "mean": {"metric": METRIC, "tasks": counted, **both(mean)},
        "missing": tasks.missing,
        "cut": last["cut"],
    }


def accuracy(metrics: dict) -> float | None:
    """The accuracy among a task's metrics, where it has one; not the one normalised by length."""
    return next((metrics[key] for key in metrics if key.partition(",")[0] == METRIC), None)


def mean(found: dict) -> float | None:
    """Of the accuracies of what `evaluate` found, every task once."""
    values = [value for value in map(accuracy, found["tasks"].values()) if value is not None]
    return sum(values) / len(values) if values else None


def _metrics(values: dict) -> dict:
    """A task's metrics as the harness names them, its first filter's without the filter's name."""
    return {
        key.removesuffix(",none"): float(value)
        if isinstance(value, (int, float, numpy.number)) and math.isfinite(value)
        else None
        for key, value in values.items()
        if "," in key
    }
