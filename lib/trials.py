"""Prunings on trial: how well the model does on windows held out, and the weights put back."""

import logging
import math
import time
from collections.abc import Callable, Mapping

from torch import Tensor

from .attribution import attribute
from .evaluate import perplexity
from .model import LanguageModel, kept

log = logging.getLogger(__name__)

STEP = 0.1  # of sparsity, over which the loss's rise is attributed; with N:M it is 1/M
HALVINGS = 2  # of a strength that does worse than uniform sparsities


def on_trial(calibration: Tensor) -> Tensor:
    """The calibration windows that a trial reads: a quarter."""
    return calibration[: -(-len(calibration) // 4)]


class Trials:
    """Prunes with `prune(targets, asymmetry, windows)`, measures the loss on `held_out` windows and undoes it.

    Each trial reads the calibration windows of `on_trial`, and meanwhile a copy of the prunable weights is held, on the
    host.
    """

    def __init__(
        self,
        model: LanguageModel,
        prune: Callable[[Mapping[str, float], float, Tensor], None],
        calibration: Tensor,
        held_out: Tensor,
        batch_size: int,
    ):
        self._model, self._prune, self._batch_size = model, prune, batch_size
        self._windows, self._held_out = on_trial(calibration), held_out
        self._known: dict[tuple, float] = {}  # sparsities and asymmetry -> the perplexity they gave

    def marginals(self, sparsity: float, asymmetry: float, group: int | None) -> tuple[dict[str, float], dict]:
        """matrix name -> its part of the loss's rise up to that uniform sparsity, and how they were found.

        The model is pruned to a little less and to `sparsity`; what the loss on the windows held out gains between the
        two is followed back to the matrices (lib/attribution.py). `uniform` is the perplexity of the second. More than
        `sparsity` is not asked about: there the model may know nothing any more, and its gradients no weight's worth.
        """
        step, begin = 1 / group if group else STEP, time.perf_counter()
        levels, names = [max(sparsity - step, 0.0), sparsity], [matrix.name for matrix in self._model.matrices]
        with kept(self._model) as weights:
            self._prune(dict.fromkeys(names, levels[0]), asymmetry, self._windows)
            before = {matrix: matrix.weight.clone() for matrix in weights}
            for matrix, weight in weights.items():
                matrix.write(weight)
            self._prune(dict.fromkeys(names, levels[1]), asymmetry, self._windows)
            uniform = self._perplexity("uniform sparsities")
            parts = attribute(self._model, before, self._held_out, batch_size=self._batch_size)
        found = {
            "parameter": "sparsities", "levels": levels, "uniform": uniform,
            "rise": math.fsum(parts.values()), "calibration_windows": len(self._windows),
            "held_out_windows": len(self._held_out), "seconds": time.perf_counter() - begin,
        }  # fmt: skip
        return parts, found

    def best(self, parameter: str, candidates: Mapping[float, tuple[Mapping[str, float], float]]) -> dict:
        """Try each {value: (targets, asymmetry)}: `chosen` is the value of the lowest perplexity, `tried` holds all."""
        tried = [self._try(parameter, value, *candidate) for value, candidate in candidates.items()]
        return self._record(parameter, tried, min(tried, key=lambda trial: trial["perplexity"])["value"])

    def halved(
        self, parameter: str, value: float, candidate: Callable[[float], tuple[Mapping[str, float], float]], most: float
    ) -> dict:
        """Try `candidate(value)`, and half the value while the perplexity is not below `most`; recorded as by `best`.

        After so many HALVINGS the `chosen` value is 0.
        """
        tried, chosen = [], 0.0
        for smaller in (value / 2**i for i in range(HALVINGS + 1)):
            tried.append(self._try(parameter, smaller, *candidate(smaller)))
            if tried[-1]["perplexity"] < most:
                chosen = smaller
                break
        return self._record(parameter, tried, chosen)

    def _perplexity(self, what: str) -> float:
        return perplexity(self._model, self._held_out, batch_size=self._batch_size, what=what)

    def _try(self, parameter: str, value: float, targets: Mapping[str, float], asymmetry: float) -> dict:
        begin, key = time.perf_counter(), (*targets.values(), asymmetry)
        if key not in self._known:
            with kept(self._model):
                self._prune(targets, asymmetry, self._windows)
                self._known[key] = self._perplexity(f"{parameter} {value:g}")
        log.info("%s %g: perplexity %.4f on windows held out", parameter, value, self._known[key])
        return {"value": value, "perplexity": self._known[key], "seconds": time.perf_counter() - begin}

    def _record(self, parameter: str, tried: list[dict], chosen: float) -> dict:
        return {
            "parameter": parameter, "chosen": chosen, "tried": tried, "calibration_windows": len(self._windows),
            "held_out_windows": len(self._held_out), "seconds": math.fsum(trial["seconds"] for trial in tried),
        }  # fmt: skip
