"""Where a run keeps its model, activations and results, and which of its steps are done already."""

from collections.abc import Callable
from typing import TypeVar

from . import results
from .activations import Store
from .analysis import note
from .config import RunConfig
from .load import Source, load_model, open_model
from .model import LanguageModel
from .stopwatch import Stopwatch
from .storage import round_to_save_dtypes

T = TypeVar("T")


class Workspace:
    """Of a run whose model is in memory: it starts from the beginning, and saves the whole model at the end.

    model  the model, once `load` was called
    store  where activations and the weights of trials are kept; None: where they are computed
    """

    model: LanguageModel
    store: Store | None = None

    def __init__(self, config: RunConfig, clock: Stopwatch, events: list[dict]):
        self._config, self._clock, self._events = config, clock, events

    def load(self, source: Source, tokenizer, seqlen: int) -> LanguageModel:
        """The model, with windows of `seqlen` tokens to come."""
        config = self._config
        self.model = load_model(
            source, config.device, config.dtype, tokenizer, config.save_dtype,
            held_tokens=config.streamed_windows * seqlen, beside=config.beside_weights,
        )  # fmt: skip
        return self.model

    def begin(self) -> None:
        """Call before the first measurement, once the model is known to be fit for the run.

        Raises RunError where another run's unfinished result is in the way.
        """

    def cached(self, name: str, make: Callable[[], T]) -> T:
        """`make()`, or what it returned in an earlier, interrupted run; `name` is unique in the run."""
        return make()

    def resume(self) -> dict:
        """Arguments of `prune_model` that skip the blocks which are done, and record each further one."""
        return {}

    def finish_pruning(self) -> None:
        """Call once all blocks are pruned: gives the weights outside them the values that are saved."""
        for message in round_to_save_dtypes(self.model.non_block_state(), self.model.save_dtypes):
            note(self._events, message)

    def save(self, record: Callable[[], dict]) -> None:
        """Write the checkpoint that was asked for and is not written yet, with `record()` beside it."""
        if self._config.save_model:
            with self._clock("save"):
                results.save_checkpoint(self.model, self._config.save_model, record())

    def close(self) -> None:
        """The run is complete: forget what a later one could resume from."""


class StreamingWorkspace(Workspace):
    """Of a run with --stream: one block in memory at a time, activations in a store, a journal of what is done."""

    _journal: results.Journal | None = None  # none for a plan, which writes no block

    def load(self, source: Source, tokenizer, seqlen: int) -> LanguageModel:
        config, source = self._config, results.convert_to_safetensors(source)
        self.model = open_model(source, config.device, config.dtype, tokenizer, config.save_dtype)
        self.model.load_non_blocks()
        return self.model

    def begin(self) -> None:
        if not self._config.plan_only:
            self._journal = results.Journal(self._config, self.model)
        self.store = results.activation_store(self._config)

    def cached(self, name: str, make: Callable[[], T]) -> T:
        return self._journal.cached(name, make) if self._journal else super().cached(name, make)

    def resume(self) -> dict:
        self._journal.use_committed(self._journal.done)
        self._events += self._journal.events
        return {"done": self._journal.done, "commit": self._journal.commit}

    def finish_pruning(self) -> None:
        super().finish_pruning()
        self._journal.finish()

    def save(self, record: Callable[[], dict]) -> None:
        """The blocks were written as they were pruned."""

    def close(self) -> None:
        self._journal.close()


def open_workspace(config: RunConfig, clock: Stopwatch, events: list[dict]) -> Workspace:
    """The workspace that the run asks for."""
    return (StreamingWorkspace if config.stream else Workspace)(config, clock, events)
