"""What a run reads beside its model: windows of text, and zero-shot tasks."""

import logging
from typing import NamedTuple

from torch import Tensor

from . import ranks
from .analysis import note
from .config import RunConfig
from .data import evaluation_windows, required_bos
from .flags import Flags
from .harness_tasks import Tasks, load_tasks
from .windows import Windows, corpus_windows

log = logging.getLogger(__name__)


class Inputs(NamedTuple):
    """Each None where the run does not read it.

    windows     what pruning and recovery see; none yet where the model is to write them
    evaluation  (windows, seqlen) token ids that perplexity is measured on
    tasks       what accuracy is measured on
    """

    windows: Windows
    evaluation: Tensor | None
    tasks: Tasks | None

    @property
    def watched(self) -> Tensor | None:
        """Windows that stand for all that the run reads: the evaluation's, or else the calibration's."""
        return self.windows.calibration if self.evaluation is None else self.evaluation


def read_inputs(config: RunConfig, tokenizer, seqlen: int, events: list[dict]) -> Inputs:
    """All of them, before any weight is read: what is missing or too short ends the run early, with a RunError.

    Tasks that cannot be had, where others can, are noted in `events`.
    """
    evaluation = None
    tasks = read_tasks(config, tokenizer, events, config.stream)
    windows = corpus_windows(config, tokenizer, seqlen)
    if config.asks("eval_wikitext"):
        evaluation = evaluation_windows(
            config.eval_data, tokenizer, seqlen=seqlen, limit=config.eval_windows, add_bos=config.add_bos,
            cache_dir=config.cache_dir,
        )  # fmt: skip
        ranks.check_enough(f"--eval_windows {len(evaluation)}", evaluation)
    return Inputs(windows, evaluation, tasks)


def read_tasks(config: Flags, tokenizer, events: list[dict], streamed: bool = False) -> Tasks | None:
    """The zero-shot tasks of a run of any command, if it is asked for them."""
    if not config.asks("eval_zero_shot"):
        return None
    bos = required_bos(tokenizer) if config.add_bos == "every" else None
    tasks = load_tasks(
        config.tasks, limit=config.task_limit, bos=bos, cache_dir=config.cache_dir, streamed=streamed
    )  # fmt: skip
    for name, why in tasks.missing.items():
        note(events, f"--tasks {name}: left out, {why}")
    return tasks
