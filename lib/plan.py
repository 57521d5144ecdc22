"""From flags to a sparsity for every matrix (`plan`), and pruning to it (`apply_plan`)."""

import contextlib
import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import replace

from torch import Tensor

from .activations import Store
from .allocation import ALLOCATIONS, Problem, allocate
from .analysis import note
from .config import RunConfig
from .distillation import dense_targets, distil
from .errors import RunError
from .flags import AUTO
from .metrics import METRICS
from .model import LanguageModel
from .pruners import PRUNERS
from .quality import allocation_scores
from .sequential import prune_model
from .stopwatch import Stopwatch
from .storage import round_to_save_dtypes
from .trials import MAX_STAND_IN_SPARSITY, STAND_IN, Trials, stand_in_held_out, trial_windows
from .windows import Windows

ASYMMETRIES = (0.0, 0.25, 0.5, 0.75, 1.0)  # what `auto` tries of --asymmetry


def plan(
    config: RunConfig,
    model: LanguageModel,
    metrics: Mapping[str, Mapping[str, float]],
    calibration: Tensor | None,
    held_out: Tensor | None = None,
    *,
    row_weights: Mapping[str, Tensor] | None = None,
    batch_size: int = 1,
    store: Store | None = None,
    cached: Callable[[str, Callable], object] = lambda _, measure: measure(),
) -> dict:
    """What the run will do to each matrix, ready for JSON: `targets` {name: sparsity} and `asymmetry`, `scores` {name:
    what the allocation read}, `searches` (for each thing chosen, what was tried and what it cost) and `events`.

    metrics are the values of --WW_metric; held_out are windows that no statistics are taken of, on which the model
    pruned on trial is measured where something is to be chosen (lib/trials.py); row_weights are for these prunings.
    `cached(key, measure)` gives `measure()`, or what it was before for the same model and windows.
    """
    allocation, options, events = ALLOCATIONS[config.allocation], dict(config.options), []
    own, of_blocks, asymmetry, searches = {}, {}, config.asymmetry, []
    trials, tried_at = None, config.sparsity
    trials_by = functools.partial(
        _trials, config, model, calibration, held_out, batch_size=batch_size, store=store, cached=cached
    )
    if config.held_out:
        trials = trials_by(row_weights=row_weights)
    if asymmetry == AUTO and trials:
        begin = allocate(config.allocation if allocation.given else "uniform", problem_of(config, model))
        searches.append(trials.grid_search("asymmetry", {value: (begin, value) for value in ASYMMETRIES}))
        asymmetry = searches[-1]["chosen"]
    if config.scored:
        metric = config.ww_metric[0]
        own = {name: METRICS[metric].sign * value for name, value in metrics[metric].items()}
    elif allocation.score:
        own, of_blocks = cached(
            f"{config.allocation} {config.mapping_type}",
            lambda: allocation_scores(
                model, [config.allocation], calibration, config.options, config.mapping_type, batch_size=batch_size,
                store=store,
            )[config.allocation],
        )  # fmt: skip
        of_blocks = {int(block): value for block, value in of_blocks.items()}  # which JSON remembers as strings
    elif allocation.uses_trials:
        if config.stands_in and not asymmetry:
            trials, tried_at = trials_by(stand_in=True), _stand_in_sparsity(config)
        own, attribution = trials.attribute_loss(tried_at, asymmetry, config.pattern.group)
        searches.append(attribution)
    problem = replace(problem_of(config, model), options=options, scores=own, block_scores=of_blocks)
    parameter = next((option for option in allocation.options if option.auto), None)
    name = parameter and parameter.name

    def candidate(value: float) -> tuple[dict[str, float], float]:
        at_value = replace(problem, options=options | {name: value}, sparsity=tried_at)
        return allocate(config.allocation, at_value, config.pattern.group), asymmetry

    if name and options[name] == AUTO:
        candidates = {}
        for value in parameter.auto:
            with contextlib.suppress(RunError):  # a range that the sparsity leaves no room for
                candidates[value] = candidate(value)
        searches.append(trials.grid_search(name, candidates))
        options[name] = searches[-1]["chosen"]
    elif allocation.uses_trials and parameter and options[name]:
        searches.append(trials.backtrack(name, options[name], candidate, attribution["uniform"]))
        options[name] = searches[-1]["chosen"]
    return {
        "targets": allocate(config.allocation, problem, config.pattern.group, events=events),
        "asymmetry": asymmetry, "scores": own if allocation.reads_mapping else {}, "searches": searches,
        "events": events,
    }  # fmt: skip


def _trials(
    config: RunConfig,
    model: LanguageModel,
    calibration: Tensor,
    held_out: Tensor,
    *,
    batch_size: int,
    store: Store | None,
    cached: Callable[[str, Callable], object],
    row_weights: Mapping[str, Tensor] | None = None,
    stand_in: bool = False,
) -> Trials:
    """Trials with the run's pruner, or on fewer windows with the one that stands in for it."""
    pruner, fisher, windows = config.pruner, config.fisher, trial_windows(calibration, stand_in)
    if stand_in:
        pruner, fisher, held_out = STAND_IN, 0.0, stand_in_held_out(held_out)
    own = [str(config.options[option.name]) for option in PRUNERS[pruner].options]
    sizes = [str(len(windows)), str(len(held_out))]
    way = " ".join([pruner, str(config.use_variant), f"{fisher:g}", config.sparsity_type, *sizes, *own])
    prune = functools.partial(
        prune_to_targets, config, model, pruner=pruner, row_weights=row_weights, batch_size=batch_size, store=store
    )
    of_way = lambda key, measure: cached(f"{key} {way}", measure)  # noqa: E731
    return Trials(model, prune, windows, held_out, batch_size, store, of_way)


def _stand_in_sparsity(config: RunConfig) -> float:
    """The sparsity at which matrices are told apart: the run's, or the most that STAND_IN and N:M allow below it."""
    group = config.pattern.group
    most = math.floor(MAX_STAND_IN_SPARSITY * group) / group if group else MAX_STAND_IN_SPARSITY
    return min(config.sparsity, most)


def problem_of(config: RunConfig, model: LanguageModel) -> Problem:
    """What an allocation may look at before anything is measured."""
    return Problem(
        sizes={matrix.name: matrix.size for matrix in model.matrices},
        blocks={matrix.name: matrix.block for matrix in model.matrices},
        shapes={matrix.name: matrix.shape for matrix in model.matrices},
        sparsity=config.sparsity, scores={}, mapping=config.mapping_type, options=config.options,
    )  # fmt: skip


def check_plan(config: RunConfig, model: LanguageModel) -> None:
    """Raises RunError, before anything is run, where an allocation that measures nothing cannot be met."""
    allocation = ALLOCATIONS[config.allocation]
    chosen = any(config.options[option.name] == AUTO for option in allocation.options)
    if not (allocation.reads_model or chosen):
        allocate(config.allocation, problem_of(config, model), config.pattern.group)


def prune_to_targets(
    config: RunConfig,
    model: LanguageModel,
    targets: Mapping[str, float],
    asymmetry: float,
    windows: Tensor | None,
    pruner: str | None = None,
    **kwargs,
) -> None:
    """`prune_model` with the flags' pruner, or another one, and pattern; `kwargs` are its other arguments."""
    chosen = PRUNERS[pruner or config.pruner]
    if config.use_variant:
        chosen = chosen.variant
    prune_model(model, chosen.at(config.options), targets, config.pattern, windows, asymmetry=asymmetry, **kwargs)


def apply_plan(
    config: RunConfig,
    model: LanguageModel,
    planned: Mapping,
    windows: Windows,
    *,
    batch_size: int,
    clock: Stopwatch,
    events: list[dict],
    **kwargs,
) -> None:
    """Prune to what `plan` gave, and train what is left as --recover says; `kwargs` are arguments of `prune_model`."""
    block, targets = config.recovers_blocks, planned["targets"]
    dense, seen = None, windows.calibration
    if block:
        seen, kwargs["stats_windows"] = windows.recovery, len(windows.calibration)
    if config.distils and any(targets.values()):
        with clock("targets"):
            shares = windows.label_shares(1 - config.distill)
            dense = dense_targets(model, windows.recovery, shares, batch_size=batch_size)
    prune_to_targets(
        config, model, targets, planned["asymmetry"], seen, recovery=block, batch_size=batch_size, clock=clock,
        events=events, **kwargs,
    )  # fmt: skip
    if dense is not None:
        with clock("recover"):
            distil(model, dense, batch_size=batch_size)
        for message in round_to_save_dtypes(model.state(), model.save_dtypes):
            note(events, message)
