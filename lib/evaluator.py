"""What a run measures of its model: perplexity and zero-shot accuracies, before pruning and after."""

import logging

from . import tokens, zero_shot
from .analysis import measure_bos_effect
from .config import RunConfig
from .evaluate import perplexity
from .inputs import Inputs
from .stopwatch import Stopwatch
from .workspace import Workspace

log = logging.getLogger(__name__)


class Evaluator:
    """Evaluates the workspace's model on the run's evaluation windows and tasks, as far as they are asked for."""

    def __init__(self, config: RunConfig, inputs: Inputs, workspace: Workspace, clock: Stopwatch):
        self._config, self._inputs, self._workspace, self._clock = config, inputs, workspace, clock
        self._dense: float | None = None
        self._dense_accuracies: dict | None = None

    def bos(self, events: list[dict]) -> dict:
        """Log how windows begin. {"bos": what BOS does to the loss}, a part of run.json's `model`, where it matters."""
        model, windows = self._workspace.model, self._inputs.watched
        if windows is None:
            return {}
        log.info("%s", tokens.describe_prefix(model.tokenizer, self._config.add_bos == "every"))
        if self._config.add_bos != "once":
            return {}
        with self._clock("evaluate"):
            return {"bos": measure_bos_effect(model, windows, events, self._workspace.store, self._workspace.cached)}

    def measure_dense(self) -> None:
        """Evaluate the model before pruning, if --eval_dense asks for it."""
        if self._config.eval_dense and self._inputs.evaluation is not None:
            self._dense = self._workspace.cached("dense", lambda: self._perplexity("dense"))
            log.info("perplexity before pruning: %.4f", self._dense)
        if self._config.eval_dense and self._inputs.tasks:
            key = f"zero_shot {self._inputs.tasks.digest}"
            self._dense_accuracies = self._workspace.cached(key, lambda: self._accuracies("dense"))

    def perplexity(self) -> dict | None:
        """The `perplexity` of run.json, of the pruned model and, where it was measured, the dense one."""
        windows = self._inputs.evaluation
        if windows is None:
            return None
        return {
            "dataset": self._config.eval_data, "split": "evaluation", "seqlen": windows.shape[1],
            "windows": len(windows), "tokens": windows.numel(), "dense": self._dense,
            "pruned": self._perplexity("pruned"),
        }  # fmt: skip

    def zero_shot(self) -> dict | None:
        """The `zero_shot` of run.json, likewise."""
        tasks = self._inputs.tasks
        return tasks and zero_shot.record(tasks, dense=self._dense_accuracies, pruned=self._accuracies("pruned"))

    def _perplexity(self, what: str) -> float:
        windows = self._inputs.evaluation
        batch_size, store = self._config.batch(windows.shape[1]), self._workspace.store
        with self._clock("evaluate"):
            return perplexity(
                self._workspace.model, windows, batch_size=batch_size, what=f"perplexity, {what}", store=store
            )

    def _accuracies(self, what: str) -> dict:
        model, tasks, store = self._workspace.model, self._inputs.tasks, self._workspace.store
        with self._clock("zero-shot"):
            return zero_shot.evaluate(model, tasks, self._config.batch, store=store, what=f"zero-shot, {what}")
