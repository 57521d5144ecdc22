"""Prunings on trial: how well the model does on windows held out, and the weights put back."""

import logging
import math
import time
from collections.abc import Callable, Mapping
from contextlib import contextmanager

from torch import Tensor

from .evaluate import perplexity
from .model import LanguageModel

log = logging.getLogger(__name__)


class Trials:
    """Prunes with `prune(targets, windows)`, measures the perplexity on `held_out` windows and undoes it.

    Each trial reads as many calibration windows as are held out, a quarter of the run's own, and so costs about a
    quarter of a pruning pass and an evaluation. Holds a copy of the prunable weights.
    """

    def __init__(
        self,
        model: LanguageModel,
        prune: Callable[[Mapping[str, float], Tensor], None],
        calibration: Tensor,
        held_out: Tensor,
        batch_size: int,
    ):
        self._model, self._prune, self._batch_size = model, prune, batch_size
        self._windows, self._held_out = calibration[: len(held_out)], held_out

    def best(self, parameter: str, candidates: Mapping[float, Mapping[str, float]]) -> dict:
        """Try each {value: targets}; the value of the lowest perplexity as `chosen`, and what each gave and cost."""
        tried, known = [], {}
        for value, targets in candidates.items():
            begin, key = time.perf_counter(), tuple(targets.values())
            if key not in known:
                with kept(self._model):
                    self._prune(targets, self._windows)
                    known[key] = perplexity(
                        self._model, self._held_out, batch_size=self._batch_size, what=f"{parameter} {value:g}"
                    )
            log.info("%s %g: perplexity %.4f on windows held out", parameter, value, known[key])
            tried.append({"value": value, "perplexity": known[key], "seconds": time.perf_counter() - begin})
        return {
            "parameter": parameter,
            "chosen": min(tried, key=lambda trial: trial["perplexity"])["value"],
            "tried": tried,
            "calibration_windows": len(self._windows),
            "held_out_windows": len(self._held_out),
            "seconds": math.fsum(trial["seconds"] for trial in tried),
        }


@contextmanager
def kept(model: LanguageModel):
    """Whatever is done to the prunable weights is undone in the end."""
    weights = {matrix: matrix.weight.clone() for matrix in model.matrices}
    try:
        yield weights
    finally:
        for matrix, weight in weights.items():
            matrix.write(weight)
