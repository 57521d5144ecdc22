"""Trial prunings: the perplexity on held-out windows, with the weights restored afterwards."""

import functools
import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor

from .activations import Store
from .attribution import attribute
from .evaluate import perplexity
from .gradients import check_differentiable
from .model import LanguageModel, Matrix

log = logging.getLogger(__name__)

STEP = 0.1  # of sparsity, over which the loss's rise is attributed; with N:M it is 1/M
HALVINGS = 2  # of a strength that does worse than uniform sparsities

# What sparsities are measured with where the run's pruner solves least squares towards symmetric targets: it tells
# matrices apart as well, for a fifth of the time (docs/log.md). Above the sparsity its models know too little to ask.
STAND_IN = "wanda"
MAX_STAND_IN_SPARSITY = 0.6
STAND_IN_WINDOWS = 8, 16  # at least, of the calibration and held out, where a trial by the run's pruner has as many


def trial_windows(calibration: Tensor, stands_in: bool = False) -> Tensor:
    """The calibration windows that a trial reads: a quarter, or of one by STAND_IN an eighth."""
    quarter = calibration[: -(-len(calibration) // 4)]
    return _half(quarter, STAND_IN_WINDOWS[0]) if stands_in else quarter


def stand_in_held_out(held_out: Tensor) -> Tensor:
    """The windows held out that a trial by STAND_IN reads: half of them."""
    return _half(held_out, STAND_IN_WINDOWS[1])


def _half(windows: Tensor, least: int) -> Tensor:
    return windows[: max(least, -(-len(windows) // 2))]


class Trials:
    """Prunes with `prune(targets, asymmetry, windows, commit=)`, measures the loss on `held_out` windows and undoes it.

    Each trial reads the `windows`. A copy of the prunable weights is held meanwhile: on the host, or of a streamed
    model in `store`. `cached(key, measure)` returns `measure()`, or its earlier value for the same model, windows and
    pruner.
    """

    def __init__(
        self,
        model: LanguageModel,
        prune: Callable,
        windows: Tensor,
        held_out: Tensor,
        batch_size: int,
        store: Store | None = None,
        cached: Callable[[str, Callable], dict] = lambda _, measure: measure(),
    ):
        self._model, self._prune, self._batch_size, self._store = model, prune, batch_size, store
        self._windows, self._held_out, self._cached = windows, held_out, cached
        self._known: dict[str, dict] = {}  # sparsities and asymmetry -> their perplexity and its seconds

    def attribute_loss(self, sparsity: float, asymmetry: float, group: int | None) -> tuple[dict[str, float], dict]:
        """matrix name -> its part of the loss's rise up to that uniform sparsity, and how they were found.

        The model is pruned to a little less and to `sparsity`; what the loss on the windows held out gains between the
        two is followed back to the matrices (lib/attribution.py). `uniform` is the perplexity of the second. Nothing
        above `sparsity` is tried: a model pruned too far predicts nothing, and its gradients rank no weights.
        """
        measure = functools.partial(self._attribute, sparsity, asymmetry, group)
        return self._cached(f"sparsities {asymmetry:g} {sparsity:g}", measure)

    def _attribute(self, sparsity: float, asymmetry: float, group: int | None) -> tuple[dict[str, float], dict]:
        step, begin = 1 / group if group else STEP, time.perf_counter()
        levels, names = [max(sparsity - step, 0.0), sparsity], [matrix.name for matrix in self._model.matrices]
        check_differentiable(self._model)
        with self._pruned(dict.fromkeys(names, levels[0]), asymmetry):
            before = self._weights()
        with self._pruned(dict.fromkeys(names, levels[1]), asymmetry) as changed:
            uniform = self._perplexity("uniform sparsities")
            parts = attribute(
                self._model, before, self._held_out, batch_size=self._batch_size, store=self._store, changed=changed
            )
        found = {
            "parameter": "sparsities", "levels": levels, "uniform": uniform,
            "rise": math.fsum(parts.values()), "calibration_windows": len(self._windows),
            "held_out_windows": len(self._held_out), "seconds": time.perf_counter() - begin,
        }  # fmt: skip
        return parts, found

    def grid_search(self, parameter: str, candidates: Mapping[float, tuple[Mapping[str, float], float]]) -> dict:
        """Try each {value: (targets, asymmetry)}: `chosen` is the value of the lowest perplexity, `tried` holds all."""
        tried = [self._try(parameter, value, *candidate) for value, candidate in candidates.items()]
        return self._record(parameter, tried, min(tried, key=lambda trial: trial["perplexity"])["value"])

    def backtrack(
        self, parameter: str, value: float, candidate: Callable[[float], tuple[Mapping[str, float], float]], most: float
    ) -> dict:
        """Backtracking: try `candidate(value)`, and halve the value while the perplexity is not below `most`.

        After HALVINGS steps the `chosen` value is 0. The record is that of `grid_search`.
        """
        tried, chosen = [], 0.0
        for smaller in (value / 2**i for i in range(HALVINGS + 1)):
            tried.append(self._try(parameter, smaller, *candidate(smaller)))
            if tried[-1]["perplexity"] < most:
                chosen = smaller
                break
        else:
            log.info("%s: uniform sparsities have %.4f and no trial has less: 0 is taken", parameter, most)
        return self._record(parameter, tried, chosen)

    @contextmanager
    def _pruned(self, targets: Mapping[str, float], asymmetry: float) -> Iterator[Callable | None]:
        """While the model is pruned on trial; gives what `LanguageModel.restored` does."""
        with self._model.restored(self._store) as changed:
            self._prune(targets, asymmetry, self._windows, commit=changed)
            yield changed

    def _weights(self) -> dict[Matrix, Tensor]:
        found = {}
        for block in range(len(self._model.blocks)):
            with self._model.resident_block(block):
                for matrix in self._model.matrices_of(block):
                    found[matrix] = self._store.copy(matrix.weight) if self._store else matrix.weight.clone()
        return found

    def _perplexity(self, what: str) -> float:
        windows, store = self._held_out, self._store
        return perplexity(self._model, windows, batch_size=self._batch_size, what=what, store=store)

    def _try(self, parameter: str, value: float, targets: Mapping[str, float], asymmetry: float) -> dict:
        def measure() -> dict:
            begin = time.perf_counter()
            with self._pruned(targets, asymmetry):
                found = self._perplexity(f"{parameter} {value:g}")
            return {"perplexity": found, "seconds": time.perf_counter() - begin}

        key = hashlib.sha256(json.dumps([asymmetry, *targets.values()]).encode()).hexdigest()[:16]
        seconds = 0.0
        if key not in self._known:
            self._known[key] = self._cached(f"trial {key}", measure)
            seconds = self._known[key]["seconds"]
        log.info("%s %g: perplexity %.4f on windows held out", parameter, value, self._known[key]["perplexity"])
        return {"value": value, "perplexity": self._known[key]["perplexity"], "seconds": seconds}

    def _record(self, parameter: str, tried: list[dict], chosen: float) -> dict:
        return {
            "parameter": parameter, "chosen": chosen, "tried": tried, "calibration_windows": len(self._windows),
            "held_out_windows": len(self._held_out), "seconds": math.fsum(trial["seconds"] for trial in tried),
        }  # fmt: skip
