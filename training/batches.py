"""Which rows each step sees, as a function of the seed and the step alone, so that a resumed run goes on as before."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from bifocal.training.tasks import Task


class StepBatches(Dataset):
    """A map-style data set whose item `step` is one batch of every task.

    Each task is passed through in a new random order per epoch; rows that do not fill a batch at the end of an epoch
    are left for the next one.

    Args:
        tasks: the tasks of the stage.
        steps: number of optimiser steps, the length of the data set.
        seed: of all random orders.
    """

    def __init__(self, tasks: Sequence[Task], steps: int, seed: int) -> None:
        self.tasks = tasks
        self.steps = steps
        self.seed = seed
        self._orders: dict[int, tuple[int, np.ndarray]] = {}

    def __len__(self) -> int:
        return self.steps

    def rows(self, number: int, step: int) -> np.ndarray:
        """The row numbers of task `number` at `step`."""
        task = self.tasks[number]
        per_epoch = len(task.dataset) // task.batch_size
        epoch, batch = divmod(step, per_epoch)
        if self._orders.get(number, (-1, None))[0] != epoch:
            order = np.random.default_rng([self.seed, number, epoch]).permutation(len(task.dataset))
            self._orders[number] = (epoch, order)
        return self._orders[number][1][batch * task.batch_size : (batch + 1) * task.batch_size]

    def __getitem__(self, step: int) -> dict[str, Any]:
        """`{"step": step, "tasks": [(task, row numbers, columns of the rows), ...]}`."""
        drawn = []
        for number, task in enumerate(self.tasks):
            rows = self.rows(number, step)
            drawn.append((task, rows, task.dataset[rows.tolist()]))
        return {"step": step, "tasks": drawn}
