"""What a run reads beside its model: windows of text, and zero-shot tasks."""

import logging
from typing import NamedTuple

from torch import Tensor

from . import ranks, zero_shot
from .analysis import note
from .config import RunConfig
from .data import calibration_windows, evaluation_windows, every_begins_with
from .flags import Flags
from .trials import on_trial

log = logging.getLogger(__name__)


class Inputs(NamedTuple):
    """Each (windows, seqlen) token ids, or None where the run does not read it.

    calibration  what pruning and allocations see
    held_out     drawn after those, for what is chosen
    evaluation   what perplexity is measured on
    tasks        what accuracy is measured on
    """

    calibration: Tensor | None
    held_out: Tensor | None
    evaluation: Tensor | None
    tasks: zero_shot.Tasks | None


def read_inputs(config: RunConfig, tokenizer, seqlen: int, events: list[dict]) -> Inputs:
    """All of them, before any weight is read: what is missing or too short ends the run early, with a RunError.

    Tasks that cannot be had, where others can, are noted in `events`.
    """
    calibration = held_out = evaluation = None
    tasks = read_tasks(config, tokenizer, events, config.stream)
    if config.calibrated:
        windows = calibration_windows(
            config.calib_data, tokenizer, nsamples=config.nsamples, seqlen=seqlen, seed=config.seed,
            held_out=config.held_out, add_bos=config.add_bos, cache_dir=config.cache_dir,
        )  # fmt: skip
        calibration, held_out = windows[: config.nsamples], windows[config.nsamples :]
        ranks.enough(f"--nsamples {config.nsamples}", on_trial(calibration) if config.held_out else calibration)
    if config.eval_wikitext:
        evaluation = evaluation_windows(
            config.eval_data, tokenizer, seqlen=seqlen, limit=config.eval_windows, add_bos=config.add_bos,
            cache_dir=config.cache_dir,
        )  # fmt: skip
        ranks.enough(f"--eval_windows {len(evaluation)}", evaluation)
    return Inputs(calibration, held_out, evaluation, tasks)


def read_tasks(config: Flags, tokenizer, events: list[dict], streamed: bool = False) -> zero_shot.Tasks | None:
    """The zero-shot tasks of a run of any command, if it is asked for them."""
    if not config.eval_zero_shot:
        return None
    bos = every_begins_with(tokenizer) if config.add_bos == "every" else None
    tasks = zero_shot.load(
        config.tasks, limit=config.task_limit, bos=bos, cache_dir=config.cache_dir, streamed=streamed
    )  # fmt: skip
    for name, why in tasks.missing.items():
        note(events, f"--tasks {name}: left out, {why}")
    return tasks
