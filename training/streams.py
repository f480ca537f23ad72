"""Reads a stream in blocks, each in random order, from a position that a checkpoint keeps."""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from bifocal.data.kinds import COLUMNS
from bifocal.data.shards import Block, ShardStream
from bifocal.data.skips import ERROR_COLUMN, RowError, SkippedRow, summary
from bifocal.errors import TrainingError, first_line
from bifocal.training.row_check import usable_row
from bifocal.training.tasks import Task


class BlockReader:
    """The rows of one reader's part of a stream, epoch after epoch.

    Rows come in blocks, and a block in an order that is a function of the seed, the epoch and the block's number. A
    position is where the stream stood at the start of the block and how many of its rows are used, so that a resumed
    reader yields exactly what was not used before. (A shuffle buffer of `datasets` loses its contents on resuming.)

    Args:
        task: whose data set is read: a `ShardStream` or a `datasets.IterableDataset`.
        seed: seed of the order in each block.
        number, count: this reader takes part `number` of `count`.
        decode: reads the value of an `image` column, and raises `RowError` where it cannot.
    """

    def __init__(
        self, task: Task, seed: int, number: int, count: int, decode: Callable[[Any], Any] | None = None
    ) -> None:
        self.task = task
        self.key = [seed, number]
        self.decode = decode
        stream = task.dataset
        self.part: Any = (
            stream.part(number, count) if isinstance(stream, ShardStream) else _DatasetPart(stream, number, count, task)
        )
        self.epoch = self.block = self.used = 0
        self.good = 0  # rows of this epoch that could be used
        self.opened = False
        self._before: Any = None
        self._names: list[str] = []
        self._columns: dict[str, list[Any]] = {}
        self._order: np.ndarray = np.empty(0, dtype=np.int64)
        self._report: tuple[int, list[SkippedRow], int] = (0, [], 0)

    def take(self, count: int) -> tuple[list[str], dict[str, list[Any]]]:
        """Return the names of the next `count` rows that can be used, and their columns, images decoded.

        Raises:
            TrainingError: if the stream has no rows for this reader, or a column is missing.
        """
        names: list[str] = []
        columns: dict[str, list[Any]] = {}
        while len(names) < count:
            if self.used >= len(self._order):
                self._next_block()
                continue
            row = int(self._order[self.used])
            self.used += 1
            try:
                stored = {name: column[row] for name, column in self._columns.items()}
                values = usable_row(self.task, stored, self.decode)
            except RowError as error:
                self._add(0, [SkippedRow.of(self._names[row], error)])
                continue
            self.good += 1
            names.append(self._names[row])
            for column, value in values.items():
                columns.setdefault(column, []).append(value)
        return names, columns

    def report(self) -> tuple[int, list[SkippedRow], int]:
        """Return the number of rows read since the last report, the skipped ones, and the files read to their end."""
        report, self._report = self._report, (0, [], 0)
        return report

    def _add(self, rows: int, skips: list[SkippedRow], shards: int = 0) -> None:
        before = self._report
        self._report = (before[0] + rows, before[1] + skips, before[2] + shards)

    def _next_block(self) -> None:
        if self.opened:
            self.block += 1
        else:
            self._open(None)
        self._before = self.part.state() if self.block else None
        block = self.part.next(self.task.shuffle_buffer_size)
        if block is None:  # the end of an epoch
            if not self.good:
                raise TrainingError(
                    f"The stream of task '{self.task.name}' has no rows for reader {self.key[1]} that can be used"
                    f"{_causes(self._report[1])}; give fewer workers or processes, or more rows."
                )
            self.epoch, self.block, self.good, self.opened = self.epoch + 1, 0, 0, False
            self._order, self.used = np.empty(0, dtype=np.int64), 0
            return
        self._add(block.rows, block.skips, block.shards)
        self._arrange(block)

    def _open(self, state: Any) -> None:
        self.part.open(self.epoch, state)
        self.opened = True

    def _arrange(self, block: Block) -> None:
        missing = [column for column in COLUMNS[self.task.kind] if column not in block.columns]
        if missing:
            raise TrainingError(
                f"The stream of task '{self.task.name}' has no column '{missing[0]}' (it has "
                f"{', '.join(block.columns)}); rename or add it."
            )
        self._columns, self.used = block.columns, 0
        self._names = block.names
        length = len(next(iter(block.columns.values())))
        self._order = np.random.default_rng([*self.key, self.epoch, self.block]).permutation(length)

    def state(self) -> dict[str, Any]:
        """Return the reader's position, in plain types."""
        return {
            "epoch": self.epoch, "block": self.block, "used": self.used, "good": self.good, "opened": self.opened,
            "stream": self._before,
        }  # fmt: skip

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue at the position of a reader of the same part."""
        self.epoch, self.block, self.good = state["epoch"], state["block"], state["good"]
        if not state["opened"]:  # nothing of this epoch was read yet
            return
        self._open(state["stream"])
        block = self.part.next(self.task.shuffle_buffer_size)
        if block is None:
            raise TrainingError(
                f"The stream of task '{self.task.name}' ends before the position of the checkpoint; resume "
                "with the data it was made with."
            )
        self._before = state["stream"]
        self._arrange(block)  # and not into the report: these rows were counted before
        self.used = state["used"]


class _DatasetPart:
    """A part of a `datasets.IterableDataset`, with the methods of a `ShardPart`.

    A row is named by its number in the stream, from 0; by its number in the part where the parts are whole shards.
    """

    def __init__(self, stream: Any, number: int, count: int, task: Task) -> None:
        from datasets.distributed import split_dataset_by_node

        # With "auto", a number of shards that is not a multiple of `count` would make every reader load every shard.
        by_shards = stream.num_shards >= count
        strategy = "shards" if by_shards else "auto"
        self.stream = split_dataset_by_node(stream, number, count, strategy=strategy) if count > 1 else stream
        self.task = task
        self.step, self.first = (1, 0) if by_shards else (count, number)
        self.suffix = f" of part {number + 1}/{count}" if by_shards and count > 1 else ""
        self.epoch = self.row = 0
        self._blocks: Iterator[dict[str, list[Any]]] = iter(())

    def open(self, epoch: int, state: Any) -> None:
        self.stream.set_epoch(epoch)
        self.epoch, self.row = epoch, 0
        if state is not None:
            self.row = state["row"]
            self.stream.load_state_dict(state["stream"])
        self._blocks = iter(self.stream.iter(batch_size=self.task.shuffle_buffer_size))

    def state(self) -> Any:
        return {"stream": self.stream.state_dict(), "row": self.row}

    def next(self, size: int) -> Block | None:
        try:
            rows = next(self._blocks, None)
        except Exception as error:  # of the code that makes the rows, or of the disk or network they come from
            line = first_line(error)[:300]
            raise TrainingError(
                f"The stream of task '{self.task.name}' cannot be read beyond row {self._name(self.row)} "
                f"({type(error).__name__}: {line}). Make it skip such rows, or keep images undecoded."
            ) from error
        if rows is None:
            return None
        total = len(next(iter(rows.values())))
        errors = rows.pop(ERROR_COLUMN, None) or [None] * total
        skips = [SkippedRow(*json.loads(error)) for error in errors if error is not None]
        kept = [row for row, error in enumerate(errors) if error is None]
        columns = rows if len(kept) == total else {name: [v[row] for row in kept] for name, v in rows.items()}
        names = [self._name(self.row + row) for row in kept]
        self.row += total
        return Block(names, columns, skips, total, 0)

    def _name(self, row: int) -> str:
        again = f", epoch {self.epoch}" if self.epoch else ""
        return f"{row * self.step + self.first}{self.suffix}{again}"


def _causes(skips: list[SkippedRow]) -> str:
    return f" ({summary(Counter(skip.cause for skip in skips))})" if skips else ""
