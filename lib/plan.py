"""From flags to a sparsity for every matrix (`plan`), and pruning to it (`apply_plan`)."""

import contextlib
import functools
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
from .trials import Trials
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
    trials = None
    if config.held_out:
        prune = functools.partial(
            prune_to_targets, config, model, row_weights=row_weights, batch_size=batch_size, store=store
        )
        own_options = [str(config.options[option.name]) for option in PRUNERS[config.pruner].options]
        way = " ".join(
            [config.pruner, str(config.use_variant), f"{config.fisher:g}", config.sparsity_type, *own_options]
        )
        cached_trial = lambda key, measure: cached(f"{key} {way}", measure)  # noqa: E731
        trials = Trials(model, prune, calibration, held_out, batch_size, store, cached_trial)
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
    elif allocation.measured:
        own, attribution = cached(
            f"{config.prune_method} {asymmetry:g} {config.sparsity:g} {way}",
            lambda: trials.attribute_loss(config.sparsity, asymmetry, config.pattern.group),
        )
        searches.append(attribution)
    problem = replace(problem_of(config, model), options=options, scores=own, block_scores=of_blocks)
    parameter = next((option for option in allocation.options if option.auto), None)
    name = parameter and parameter.name

    def candidate(value: float) -> tuple[dict[str, float], float]:
        at_value = replace(problem, options=options | {name: value})
        return allocate(config.allocation, at_value, config.pattern.group), asymmetry

    if name and options[name] == AUTO:
        candidates = {}
        for value in parameter.auto:
            with contextlib.suppress(RunError):  # a range that the sparsity leaves no room for
                candidates[value] = candidate(value)
        searches.append(trials.grid_search(name, candidates))
        options[name] = searches[-1]["chosen"]
    elif allocation.measured and parameter and options[name]:
        searches.append(trials.backtrack(name, options[name], candidate, attribution["uniform"]))
        options[name] = searches[-1]["chosen"]
    return {
        "targets": allocate(config.allocation, problem, config.pattern.group, events=events),
        "asymmetry": asymmetry, "scores": own if allocation.granular else {}, "searches": searches, "events": events,
    }  # fmt: skip


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
    if not (allocation.measures or chosen):
        allocate(config.allocation, problem_of(config, model), config.pattern.group)


def prune_to_targets(
    config: RunConfig,
    model: LanguageModel,
    targets: Mapping[str, float],
    asymmetry: float,
    windows: Tensor | None,
    **kwargs,
) -> None:
    """`prune_model` with the flags' pruner and pattern; `kwargs` are its other arguments."""
    pruner = PRUNERS[config.pruner]
    if config.use_variant:
        pruner = pruner.variant
    prune_model(model, pruner.at(config.options), targets, config.pattern, windows, asymmetry=asymmetry, **kwargs)


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
