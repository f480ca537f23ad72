"""Epochs in joint training: how many steps they have, and callbacks at their ends."""

import math
from collections.abc import Sequence
from typing import Any

from transformers import TrainerCallback

from bifocal.errors import TrainingError
from bifocal.training.tasks import Task


def steps_per_epoch(tasks: Sequence[Task], processes: int, accumulation: int, alternate: bool = False) -> int | None:
    """Return the optimiser steps of an epoch; None if a task streams without `num_rows`.

    An epoch has as many batches as the rows of the image-text tasks fill, or those of the text tasks, whichever are
    more; twice as many where batches of the two modalities alternate. So a task that is the only one of its modality is
    passed through once (or more often, if the other has more rows); sampling weights change which task's rows are drawn
    more often than others', not the length.

    Args:
        tasks: tasks that are trained on.
        processes: number of processes.
        accumulation: batches of an optimiser step.
        alternate: batches hold one modality in turn (`alternate_modalities`).
    """
    batches = {"image": 0, "text": 0}
    for task in tasks:
        rows = task.num_rows if task.streams else len(task.dataset)
        if rows is None:
            return None
        if task.sampling_weight > 0:
            batches[task.modality] += max(1, rows // (task.batch_size * processes))
    longest = max(batches.values()) * (2 if alternate and all(batches.values()) else 1)
    return -(-longest // accumulation)


def set_steps(args: Any, steps: int | None, tasks: Sequence[Task]) -> None:
    """Turn `num_train_epochs` into `max_steps` where the latter is not given.

    Raises:
        TrainingError: if epochs are asked for and their length is not known.
    """
    strategies = [n for n in ("eval_strategy", "save_strategy", "logging_strategy") if getattr(args, n) == "epoch"]
    if steps is None:
        name = next(task.name for task in tasks if task.streams and task.num_rows is None)
        if args.max_steps <= 0:
            raise TrainingError(
                f"An epoch has no length, since task '{name}' streams; set max_steps, or num_rows of the task."
            )
        if strategies:
            raise TrainingError(
                f"{strategies[0]}='epoch' has no meaning, since task '{name}' streams; use 'steps', or set num_rows of "
                "the task."
            )
    elif args.max_steps <= 0:
        args.max_steps = math.ceil(args.num_train_epochs * steps)


class EpochEnds(TrainerCallback):
    """Tells all callbacks where epochs end and begin.

    The Trainer passes through the batches of a run once, which resumes exactly at any step, and so sees one epoch.
    This one must stand after all others.

    Args:
        handler: the trainer's `CallbackHandler`.
        steps: optimiser steps of an epoch.
    """

    def __init__(self, handler: Any, steps: int) -> None:
        self.handler = handler
        self.steps = steps
        self.ended = -1  # the step whose epoch end the callbacks know of

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        state.num_train_epochs = math.ceil(state.max_steps / self.steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if state.global_step % self.steps or state.global_step >= state.max_steps:
            return None  # the Trainer itself ends the last epoch
        control = self.handler.on_epoch_end(args, state, control)
        self.ended = state.global_step
        return self.handler.on_epoch_begin(args, state, control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Early stopping: the Trainer itself ends the epoch, too, but all that is due was done.
        if state.global_step == self.ended:
            control.should_log = control.should_evaluate = control.should_save = False
