"""Reading a streamed data set in blocks, each in random order, from a position that can be kept and found again."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from bifocal.training.tasks import COLUMNS, Task, TrainingError

BLOCK = 1024


class BlockReader:
    """The rows of one reader's part of a `datasets.IterableDataset`, again and again.

    Rows come in blocks, and a block in an order that is a function of the seed, the epoch and the block's number. A
    position is where the stream stood at the start of the block and how many of its rows are used, so that a resumed
    reader yields exactly what was not used before. (A shuffle buffer of `datasets` loses its contents on resuming.)

    Args:
        task: whose data set is read.
        seed: of the order in each block.
        number, count: this reader takes part `number` of `count`.
    """

    def __init__(self, task: Task, seed: int, number: int, count: int) -> None:
        from datasets.distributed import split_dataset_by_node

        self.task = task
        self.stream = split_dataset_by_node(task.dataset, number, count) if count > 1 else task.dataset
        self.key = [seed, number]
        self.epoch = self.block = self.used = 0
        self._blocks: Iterator[dict[str, list[Any]]] | None = None
        self._before: Any = None
        self._rows: dict[str, list[Any]] = {}
        self._order: np.ndarray = np.empty(0, dtype=np.int64)

    def take(self, count: int) -> tuple[list[str], dict[str, list[Any]]]:
        """Names of the next `count` rows, and their columns.

        Raises:
            TrainingError: the stream has no rows for this reader, or lacks a column.
        """
        names: list[str] = []
        columns: dict[str, list[Any]] = {}
        while len(names) < count:
            if self.used >= len(self._order):
                self._next_block()
            chosen = self._order[self.used : self.used + count - len(names)]
            for column, values in self._rows.items():
                columns.setdefault(column, []).extend(values[row] for row in chosen)
            names += [f"{self.epoch}/{self.block}/{row}" for row in chosen]
            self.used += len(chosen)
        return names, columns

    def _next_block(self) -> None:
        if self._blocks is None:
            self._open()
        else:
            self.block += 1
        found = self._read()
        if found is None:  # the end of an epoch
            if self.block == 0:
                raise TrainingError(
                    f"The stream of task '{self.task.name}' has no rows for reader {self.key[1]}; give fewer workers "
                    "or processes, or more rows."
                )
            self.epoch, self.block = self.epoch + 1, 0
            self._open()
            found = self._read()
            if found is None:
                raise TrainingError(f"The stream of task '{self.task.name}' had rows once and has none now.")
        self._arrange(found)

    def _open(self) -> None:
        self.stream.set_epoch(self.epoch)
        self._blocks = iter(self.stream.iter(batch_size=BLOCK))

    def _read(self) -> dict[str, list[Any]] | None:
        self._before = self.stream.state_dict() if self.block else None
        assert self._blocks is not None
        return next(self._blocks, None)

    def _arrange(self, rows: dict[str, list[Any]]) -> None:
        missing = [column for column in COLUMNS[self.task.kind] if column not in rows]
        if missing:
            raise TrainingError(
                f"The stream of task '{self.task.name}' lacks the column '{missing[0]}' (it has {', '.join(rows)}); "
                "rename or add it."
            )
        self._rows, self.used = rows, 0
        length = len(next(iter(rows.values())))
        self._order = np.random.default_rng([*self.key, self.epoch, self.block]).permutation(length)

    def state(self) -> dict[str, Any]:
        """Where the reader stands, in plain types."""
        return {"epoch": self.epoch, "block": self.block, "used": self.used, "stream": self._before}

    def load_state(self, state: dict[str, Any]) -> None:
        """Stand where a reader of the same part stood."""
        self.epoch, self.block, self.used = state["epoch"], state["block"], 0
        if not state["used"]:  # nothing was read yet
            return
        if state["stream"] is not None:
            self.stream.set_epoch(self.epoch)
            self.stream.load_state_dict(state["stream"])
        self._open()
        assert self._blocks is not None
        found = next(self._blocks, None)
        if found is None:
            raise TrainingError(
                f"The stream of task '{self.task.name}' ends before the place where the checkpoint was made; resume "
                "with the data it was made with."
            )
        self._before = state["stream"]
        self._arrange(found)
        self.used = state["used"]
