"""The time a stage took over all its runs."""

import time
from typing import Any

from transformers.trainer_callback import ExportableState, TrainerCallback


class Stopwatch(TrainerCallback, ExportableState):
    """Seconds spent in training, carried over from checkpoint to checkpoint."""

    def __init__(self, seconds: float = 0.0) -> None:
        self._before = seconds
        self._started: float | None = None

    @property
    def seconds(self) -> float:
        return self._before + (0.0 if self._started is None else time.monotonic() - self._started)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._started = time.monotonic()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._before, self._started = self.seconds, None

    def state(self) -> dict[str, Any]:
        return {"args": {"seconds": self.seconds}, "attributes": {}}


def training_seconds(trainer: Any) -> float:
    """Return the seconds of a trainer's `Stopwatch`, which a resumed trainer replaces by that of its checkpoint."""
    return next(c.seconds for c in trainer.callback_handler.callbacks if isinstance(c, Stopwatch))
