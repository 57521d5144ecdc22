"""run.json of a pruning while it grows."""

from collections.abc import Sequence

from ..config import RunConfig
from ..stopwatch import Stopwatch
from .checkpoint import describe_checkpoint
from .report import draw_plan, write_report
from .run import append_result, build_record, write_run


class PruningRecord:
    """What is known of a run once its model is pruned, or planned to be; evaluations are set when they are done.

    `model` is that of run.json; layers, searches and zero_shot are as `build_record` takes them.
    """

    perplexity: dict | None = None
    zero_shot: dict | None = None

    def __init__(
        self,
        config: RunConfig,
        model: dict,
        layers: list[dict],
        searches: Sequence[dict],
        clock: Stopwatch,
        events: list[dict],
    ):
        self._config, self._model, self._layers, self._searches = config, model, layers, searches
        self._clock, self._events = clock, events

    def build(self) -> dict:
        """The contents of run.json as of now."""
        seconds = self._clock.seconds()
        return build_record(
            self._config, self._model, self._layers, self.perplexity, seconds, self._events, self._searches,
            self.zero_shot,
        )  # fmt: skip

    def write(self) -> None:
        """Write run.json and the tables as of now, so that nothing is lost if what follows fails."""
        write_run(self._config, self.build())

    def finish(self, scores: dict[str, dict[str, float]], esds: dict[str, dict]) -> dict:
        """Write everything that the run leaves behind; the contents of run.json."""
        final = self.build()
        folder = write_run(self._config, final)
        if self._config.plot:
            write_report(folder, final, scores, esds)
        elif self._config.plan_only:
            draw_plan(folder, final)
        if self._config.plan_only:
            return final
        append_result(self._config, final)
        if self._config.save_model:
            describe_checkpoint(self._config, final)
        return final
