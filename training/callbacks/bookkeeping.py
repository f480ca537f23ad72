"""Trainer callbacks: what happens in each step, the time a stage took over all its runs, one quiet progress bar."""

import time
from collections.abc import Sequence
from typing import Any

from transformers import EarlyStoppingCallback
from transformers.trainer_callback import ExportableState, ProgressCallback, TrainerCallback

from bifocal.training.callbacks.epochs import EpochEnds
from bifocal.training.engine.joint_forward import clamp_logit_scale


class Bookkeeping(TrainerCallback):
    """What `MultiTaskTrainer` does in each step before any other callback sees it.

    Args:
        trainer: a `MultiTaskTrainer`.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.order_callbacks()  # callbacks that are restored from a checkpoint come last
        self.trainer.meters.seen = 0

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        clamp_logit_scale(model)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.commit_positions()
        if self.trainer.steps_per_epoch is not None:
            state.epoch = state.global_step / self.trainer.steps_per_epoch
        if self.trainer.average is not None:
            self.trainer.average.update()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.keep_average()


def in_order(callbacks: Sequence[TrainerCallback]) -> list[TrainerCallback]:
    """Callbacks in the order in which they must run, whatever order they were given in.

    Those that add metrics (`adds_metrics = True`) run before those that read them, and early stopping after all that
    may add some; otherwise it would find no metric and never stop.
    """

    def rank(callback: TrainerCallback) -> int:
        if isinstance(callback, Bookkeeping):
            return 0
        if isinstance(callback, EarlyStoppingCallback):
            return 3
        if isinstance(callback, EpochEnds):
            return 4
        return 1 if getattr(callback, "adds_metrics", False) else 2

    return sorted(callbacks, key=rank)


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


def seconds_of(trainer: Any) -> float:
    """The seconds of a trainer's `Stopwatch`; a resumed trainer has another one than it was given."""
    return next(c.seconds for c in trainer.callback_handler.callbacks if isinstance(c, Stopwatch))


class StageProgress(ProgressCallback):
    """The Trainer's progress bar with a name and the latest loss at its end instead of a line for every log."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description(self.name)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.training_bar is not None and logs and "loss" in logs:
            self.training_bar.set_postfix(loss=f"{float(logs['loss']):.3f}")
