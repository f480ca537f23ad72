"""A source of many files as a stream: read in parts without overlap or gap, from a position that can be kept."""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from bifocal.data.kinds import KINDS
from bifocal.data.paths import is_remote
from bifocal.data.skips import Fault, Skip
from bifocal.data.text_files import FileFault, Reader, Row, lost, short

_BLOCK_BYTES = 256 * 2**20  # of pictures in a block
_TRIES = 3  # of reading on where a connection was lost, each after a longer pause
_PAUSE = 0.5  # seconds

Normalise = Callable[[str, dict[str, Any]], dict[str, Any]]


class Block(NamedTuple):
    """Rows that follow one another in a part.

    Args:
        names, columns: of the rows that are good.
        skips: those that are not.
        rows: how many there were of both.
        shards: how many files ended.
    """

    names: list[str]
    columns: dict[str, list[Any]]
    skips: list[Skip]
    rows: int
    shards: int


class ShardStream:
    """Rows of one kind from many files.

    Args:
        shards: names of the files; none is looked at before it is read.
        read: the rows of a file.
        normalise: from a row as it is to one of the kind.
        kind: of the rows.
        seed: of the order of the files in each epoch; epoch 0 takes them as given when None.
    """

    def __init__(
        self, shards: Sequence[str], read: Reader, normalise: Normalise, kind: str, seed: int | None = 0
    ) -> None:
        self.shards = shards
        self.read = read
        self.normalise = normalise
        self.kind = kind
        self.seed = seed
        self._ambiguous = len(set(map(short, shards))) < len(shards)
        self.column_names = [*KINDS[kind], *(["image_id"] if "image" in KINDS[kind] else [])]

    def part(self, number: int, count: int) -> "ShardPart":
        """Part `number` of `count`."""
        return ShardPart(self, number, count)

    def as_iterable(self) -> Any:
        """A `datasets.IterableDataset` of the good rows, for other trainers than ours.

        Bad rows are left out in silence, and a resumed run reads up to its place again.
        """
        from datasets import IterableDataset

        return IterableDataset.from_generator(_good_rows, gen_kwargs={"shards": list(self.shards), "stream": self})

    def read_shard(self, shard: str, start: Any = None) -> Iterator[Row]:
        """Yield the rows of a file, named by its whole path if another file has the same name."""
        for row in read_on(self.read, shard, start):
            named = self._ambiguous and row.name.startswith(short(shard))
            yield row._replace(name=shard + row.name.removeprefix(short(shard))) if named else row

    def rows(self) -> Iterator[tuple[str, dict[str, Any] | Fault]]:
        """Every row once with its name, good or not, in the order of the files."""
        for shard in self.shards:
            for row in self.read_shard(shard):
                yield row.name, normalised(self.normalise, row)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (row for _, row in self.rows() if not isinstance(row, Fault))


def _good_rows(shards: list[str], stream: ShardStream) -> Iterator[dict[str, Any]]:
    part = ShardStream(shards, stream.read, stream.normalise, stream.kind, None)
    return iter(part)


def normalised(normalise: Normalise, row: Row) -> dict[str, Any] | Fault:
    if isinstance(row.value, Fault):
        return row.value
    try:
        return normalise(row.name, row.value)
    except Fault as fault:
        return fault


def read_on(read: Reader, shard: str, start: Any = None) -> Iterator[Row]:
    """The rows of a file, which is opened again where a connection was lost; a file that cannot be read is a fault."""
    position, tries = start, 0
    while True:
        try:
            for row in read(shard, position):
                broken = isinstance(row.value, Fault) and row.value.cause == "file breaks off"
                if broken and is_remote(shard) and tries < _TRIES:
                    raise ConnectionError(str(row.value))
                position, tries = row.position, 0
                yield row
            return
        except FileFault as fault:
            yield Row(None, short(shard), fault)
            return
        except FileNotFoundError as error:
            yield Row(None, short(shard), lost(error))
            return
        except Exception as error:
            # What a protocol raises is its own; of a file here only an OSError may be meant for the reader.
            if not is_remote(shard) and not isinstance(error, OSError):
                raise
            tries += 1
            if not is_remote(shard) or tries > _TRIES:
                yield Row(None, short(shard), lost(error))
                return
            time.sleep(_PAUSE * tries)


class ShardPart:
    """What one reader of many takes of a stream.

    While there are as many files as readers, each file is read by one of them. Where there are fewer, readers share a
    file, and each takes its share of the rows. In every epoch the parts together hold every row once.

    Args:
        stream: what is read.
        number, count: this is part `number` of `count`.
    """

    def __init__(self, stream: ShardStream, number: int, count: int) -> None:
        self.stream = stream
        self.number, self.count = number, count
        self._rows: Iterator[tuple[Row | None, dict[str, Any]]] = iter(())

    def open(self, epoch: int, state: dict[str, Any] | None = None) -> None:
        """Begin an epoch, or go on with it from a state."""
        self._state = state or {"shard": 0, "row": 0, "position": None}
        self._rows = self._read(epoch, self._state)

    def state(self) -> dict[str, Any]:
        """Where the part stands between two blocks, in plain types."""
        return self._state

    def next(self, size: int) -> Block | None:
        """The next rows, at most `size` and at most 256 MiB of pictures; None at the end of the epoch."""
        names: list[str] = []
        columns: dict[str, list[Any]] = {name: [] for name in self.stream.column_names}
        skips: list[Skip] = []
        shards = held = 0
        for row, state in self._rows:
            self._state = state
            if row is None:
                shards += 1
                continue
            found = normalised(self.stream.normalise, row)
            if isinstance(found, Fault):
                skips.append(Skip.of(row.name, found))
            else:
                names.append(row.name)
                for column, values in columns.items():
                    values.append(found[column])
                if isinstance(found.get("image"), bytes):
                    held += len(found["image"])
            if len(names) + len(skips) >= size or held >= _BLOCK_BYTES:
                break
        rows = len(names) + len(skips)
        return Block(names, columns, skips, rows, shards) if rows or shards else None

    def _mine(self, epoch: int) -> tuple[Sequence[int], int, int]:
        """Numbers of the files of this part, and which rows of each: every so many-th from a first on."""
        total = len(self.stream.shards)
        order: Any = range(total)
        if self.stream.seed is not None:
            order = np.random.default_rng([self.stream.seed, epoch]).permutation(total)
        if total >= self.count:
            return order[self.number :: self.count], 1, 0
        sharing = len(range(self.number % total, self.count, total))
        return order[self.number % total :: total][:1], sharing, self.number // total

    def _read(self, epoch: int, state: dict[str, Any]) -> Iterator[tuple[Row | None, dict[str, Any]]]:
        """(row, state after it), and (None, state) at the end of each file."""
        mine, every, first = self._mine(epoch)
        position, number = state["position"], state["row"]
        for place in range(state["shard"], len(mine)):
            whole = True
            for row in self.stream.read_shard(self.stream.shards[mine[place]], position):
                at = number
                number += 1
                is_lost = isinstance(row.value, Fault) and row.value.shard
                whole = whole and not is_lost
                if at % every == first or is_lost:
                    after = {"shard": place, "row": number, "position": row.position}
                    yield row, {"shard": place + 1, "row": 0, "position": None} if is_lost else after
            position, number = None, 0
            if whole:
                yield None, {"shard": place + 1, "row": 0, "position": None}
