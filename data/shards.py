"""A source of many files as a stream: read in parts without overlap or gap, and resumed from a saved position."""

import copy
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from bifocal.data.kinds import KINDS
from bifocal.data.paths import is_remote
from bifocal.data.skips import RowError, SkippedRow
from bifocal.data.text_files import FileError, Reader, Row, file_error, file_name

_BLOCK_BYTES = 256 * 2**20  # of images per block
_TRIES = 3  # to resume after a lost connection, each after a longer pause
_PAUSE = 0.5  # seconds

Normalise = Callable[..., dict[str, Any]]  # from a name, a raw row and perhaps its folder; raises RowError


class Block(NamedTuple):
    """Consecutive rows of a part.

    Args:
        names, columns: names and columns of the good rows.
        skips: the bad rows.
        rows: number of good and bad rows.
        shards: number of files read to their end.
    """

    names: list[str]
    columns: dict[str, list[Any]]
    skips: list[SkippedRow]
    rows: int
    shards: int


class ShardStream:
    """Rows of one kind from many files.

    Args:
        shards: names of the files; none is opened before it is read.
        read: reader of a file.
        normalise: turns a raw row into a row of the kind.
        kind: kind of the rows.
        seed: seed for the order of the files in each epoch; None keeps their order.
        full_names: name rows by the whole path of their file, since two files of the source have the same name.
        own_folders: relative image paths start from the folder of their file, since the files lie in several.
    """

    def __init__(
        self,
        shards: Sequence[str],
        read: Reader,
        normalise: Normalise,
        kind: str,
        seed: int | None = 0,
        full_names: bool = False,
        own_folders: bool = False,
    ) -> None:
        self.shards = shards
        self.read = read
        self.normalise = normalise
        self.kind = kind
        self.seed = seed
        self._full_names, self._own_folders = full_names, own_folders
        self.column_names = [*KINDS[kind], *(["image_id"] if "image" in KINDS[kind] else [])]

    def part(self, number: int, count: int) -> "ShardPart":
        """Return part `number` of `count`."""
        return ShardPart(self, number, count)

    def as_iterable(self) -> Any:
        """Return a `datasets.IterableDataset` of the good rows, for other trainers.

        Bad rows are skipped without a log, and a resumed run reads again up to its position.
        """
        from datasets import IterableDataset

        return IterableDataset.from_generator(_good_rows, gen_kwargs={"shards": list(self.shards), "stream": self})

    def read_shard(self, shard: str, start: Any = None) -> Iterator[Row]:
        """Yield the rows of a file."""
        for row in read_on(self.read, shard, start):
            if self._full_names and row.name.startswith(file_name(shard)):
                row = row._replace(name=shard + row.name.removeprefix(file_name(shard)))
            yield row._replace(folder=os.path.dirname(shard) or ".") if self._own_folders else row

    def rows(self) -> Iterator[tuple[str, dict[str, Any] | RowError]]:
        """Yield every row with its name, in the order of the files; a bad row is a `RowError`."""
        for shard in self.shards:
            for row in self.read_shard(shard):
                yield row.name, normalised(self.normalise, row)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (row for _, row in self.rows() if not isinstance(row, RowError))


def _good_rows(shards: list[str], stream: ShardStream) -> Iterator[dict[str, Any]]:
    part = copy.copy(stream)
    part.shards, part.seed = shards, None
    return iter(part)


def normalised(normalise: Normalise, row: Row) -> dict[str, Any] | RowError:
    """Return a row of the kind, or why it cannot be used."""
    if isinstance(row.value, RowError):
        return row.value
    try:
        return normalise(row.name, row.value) if row.folder is None else normalise(row.name, row.value, row.folder)
    except RowError as row_error:
        return row_error


def read_on(read: Reader, shard: str, start: Any = None) -> Iterator[Row]:
    """Yield the rows of a file and reopen it after a lost connection; a file that cannot be read is a `RowError`."""
    position, tries = start, 0
    while True:
        try:
            for row in read(shard, position):
                broken = isinstance(row.value, RowError) and row.value.cause == "file breaks off"
                if broken and is_remote(shard) and tries < _TRIES:
                    raise ConnectionError(str(row.value))
                position, tries = row.position, 0
                yield row
            return
        except FileError as row_error:
            yield Row(None, file_name(shard), row_error)
            return
        except FileNotFoundError as error:
            yield Row(None, file_name(shard), file_error(error))
            return
        except Exception as error:
            # Each remote protocol has its own errors; reading a local file only raises OSError.
            if not is_remote(shard) and not isinstance(error, OSError):
                raise
            tries += 1
            if not is_remote(shard) or tries > _TRIES:
                yield Row(None, file_name(shard), file_error(error))
                return
            time.sleep(_PAUSE * tries)


class ShardPart:
    """The part of a stream that one of several readers takes.

    With at least as many files as readers, each file has one reader. With fewer files, readers share a file, and each
    takes its part of the rows. In every epoch the parts together hold every row once.

    Args:
        stream: the stream.
        number, count: number of this part, and of all parts.
    """

    def __init__(self, stream: ShardStream, number: int, count: int) -> None:
        self.stream = stream
        self.number, self.count = number, count
        self._rows: Iterator[tuple[Row | None, dict[str, Any]]] = iter(())

    def open(self, epoch: int, state: dict[str, Any] | None = None) -> None:
        """Start an epoch, or resume it from a state."""
        self._state = state or {"shard": 0, "row": 0, "position": None}
        self._rows = self._read(epoch, self._state)

    def state(self) -> dict[str, Any]:
        """Return the position between two blocks, in plain types."""
        return self._state

    def next(self, size: int) -> Block | None:
        """Return the next rows, at most `size` and about 256 MiB of images; None at the end of the epoch."""
        names: list[str] = []
        columns: dict[str, list[Any]] = {name: [] for name in self.stream.column_names}
        skips: list[SkippedRow] = []
        shards = held = 0
        for row, state in self._rows:
            self._state = state
            if row is None:
                shards += 1
                continue
            row_values = normalised(self.stream.normalise, row)
            if isinstance(row_values, RowError):
                skips.append(SkippedRow.of(row.name, row_values))
            else:
                names.append(row.name)
                for column, values in columns.items():
                    values.append(row_values[column])
                if isinstance(row_values.get("image"), bytes):
                    held += len(row_values["image"])
            if len(names) + len(skips) >= size or held >= _BLOCK_BYTES:
                break
        rows = len(names) + len(skips)
        return Block(names, columns, skips, rows, shards) if rows or shards else None

    def _own_shards(self, epoch: int) -> tuple[Sequence[int], int, int]:
        """Return the numbers of this part's files, and the step and first of the rows to take from each."""
        total = len(self.stream.shards)
        order: Any = range(total)
        if self.stream.seed is not None:
            order = np.random.default_rng([self.stream.seed, epoch]).permutation(total)
        if total >= self.count:
            return order[self.number :: self.count], 1, 0
        sharing = len(range(self.number % total, self.count, total))
        return order[self.number % total :: total][:1], sharing, self.number // total

    def _read(self, epoch: int, state: dict[str, Any]) -> Iterator[tuple[Row | None, dict[str, Any]]]:
        """Yield each row with the state after it, and (None, state) at the end of each file."""
        mine, every, first = self._own_shards(epoch)
        position, number = state["position"], state["row"]
        for shard in range(state["shard"], len(mine)):
            whole = True
            for row in self.stream.read_shard(self.stream.shards[mine[shard]], position):
                at = number
                number += 1
                is_lost = isinstance(row.value, RowError) and row.value.file_lost
                whole = whole and not is_lost
                if at % every == first or is_lost:
                    after = {"shard": shard, "row": number, "position": row.position}
                    yield row, {"shard": shard + 1, "row": 0, "position": None} if is_lost else after
            position, number = None, 0
            if whole:
                yield None, {"shard": shard + 1, "row": 0, "position": None}
