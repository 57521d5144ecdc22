"""Seconds by stage."""

import time
from contextlib import contextmanager

import torch


class Stopwatch:
    """Adds up wall-clock seconds under names: `with clock("load"): ...`.

    Work queued on a GPU is waited for, so that it counts where it was asked for. Where a GPU's memory is full, the
    error gets the name of its `stage`.
    """

    def __init__(self):
        self._start = time.perf_counter()
        self._seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str):
        begin = time.perf_counter()
        try:
            yield
        except torch.OutOfMemoryError as error:
            error.stage = getattr(error, "stage", stage)  # the innermost
            raise
        finally:
            if torch.cuda.is_available() and torch.cuda.is_initialized():
                for index in range(torch.cuda.device_count()):
                    if torch.cuda.memory_reserved(index):  # the others are none of ours
                        torch.cuda.synchronize(index)
            self._seconds[stage] = self._seconds.get(stage, 0.0) + time.perf_counter() - begin

    def seconds(self) -> dict[str, float]:
        """Seconds of every stage so far, and `total` since the stopwatch was made."""
        return {**self._seconds, "total": time.perf_counter() - self._start}
