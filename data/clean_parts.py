"""The parts of a clean copy: some files of a source, written by one task, whole or not at all."""

import hashlib
import json
import os
import re
import secrets
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bifocal.data.filters import Cleaning
from bifocal.data.leakage import Evaluations
from bifocal.data.loading import load_source, open_stream
from bifocal.data.part_comparison import LEAKS, NAMES, SIGNATURES, sign_part
from bifocal.data.paths import MISSING
from bifocal.data.row_names import with_plain_image
from bifocal.data.skips import RowError, SkipLog, SkippedRow
from bifocal.data.source import Source
from bifocal.data.tables import file_stamp, uniform_rows
from bifocal.errors import DataError, first_line

_ROWS = 10_000  # rows per file
_GROUP = 256  # rows held in memory, images included
_COUNTS, _SKIPS, _IMAGES = "counts.json", "skips.jsonl", "images.jsonl"
ROW_FILE = r"\d{5}\.parquet"
PART_NAME = re.compile(r"\d{5}-(whole|[0-9a-f]{16})(\.\w{8})?")  # with a suffix while it is written
_PART_FILE = re.compile(ROW_FILE + "|" + "|".join(map(re.escape, (_COUNTS, _SKIPS, _IMAGES, NAMES, SIGNATURES, LEAKS))))


@dataclass(frozen=True)
class Part:
    """Some files of a source, cleaned by one task.

    Args:
        name: first of its files, for messages.
        sources: the files as sources, or one source that is read as a whole.
        features: `datasets.Features` of the rows; None for a source that `load_source` loads with all its filters.
        folder: its folder when it is complete.
        shown: folder of the copy, for messages.
        compared: the filters that compare its rows with those of other parts; None if there are none.
    """

    name: str
    sources: tuple[Source, ...]
    kind: str
    features: Any
    folder: Path
    shown: Path
    compared: Cleaning | None = None

    @property
    def is_written(self) -> bool:
        """Return whether it is complete; it is not if a run was killed while it removed the part."""
        return (self.folder / _COUNTS).exists()

    @property
    def is_current(self) -> bool:
        """Return whether it is complete, with nothing that may be read better or otherwise now."""
        if not self.is_written or self.features is None:
            return False
        if any(skip.cause == MISSING or skip.file_lost for skip in self.skips()):
            return False
        with (self.folder / _IMAGES).open(encoding="utf-8") as images:
            return all(file_stamp(stamp[0]) == stamp for stamp in map(json.loads, images))

    @property
    def rows(self) -> int:
        """Return the number of its good rows."""
        return int(self.counts()["good"])

    def counts(self) -> dict[str, Any]:
        """Return the numbers of good rows, of all rows and of files read to their end."""
        return json.loads((self.folder / _COUNTS).read_text())

    def skips(self) -> Iterator[SkippedRow]:
        """Yield the rows that are skipped, whatever the other parts hold."""
        with (self.folder / _SKIPS).open(encoding="utf-8") as file:
            yield from (SkippedRow(*json.loads(line)) for line in file)

    def write(self, folder: Path, evaluations: Evaluations) -> None:
        """Write the rows, what is known of each, and their counts."""
        with (
            (folder / _SKIPS).open("w", encoding="utf-8", errors="backslashreplace") as skips,
            (folder / _IMAGES).open("w", encoding="utf-8") as images,
            (folder / NAMES).open("w", encoding="utf-8") if self.compared is not None else nullcontext() as names,
        ):
            recorder = _Recorder(skips, names)
            good = _write_rows(_tables(self, recorder, images), folder)
        if self.compared is not None:
            sign_part(_plain_rows(folder), self.kind, self.compared, evaluations, self.name, folder)
        counts = {"good": good, "rows": recorder.rows.total(), "shards": recorder.shards.total()}
        (folder / _COUNTS).write_text(json.dumps({**counts, "id": secrets.token_hex(8)}))


@dataclass(frozen=True)
class ReducedPart:
    """A part without the rows that are skipped for a row of this or another part.

    Args:
        part: the part, which is complete.
        skipped: numbers of these rows, sorted.
    """

    part: Part
    skipped: np.ndarray

    @property
    def name(self) -> str:
        """The first file of the part, for messages."""
        return self.part.name

    @property
    def shown(self) -> Path:
        """The folder of the copy, for messages."""
        return self.part.shown

    @property
    def folder(self) -> Path:
        """Its folder when it is complete, another one whenever the part was written again."""
        facts = self.part.counts()["id"].encode() + self.skipped.tobytes()
        key = hashlib.blake2b(facts, digest_size=8).hexdigest()
        return self.part.folder.with_name(f"{self.part.folder.name[:5]}-{key}")

    @property
    def is_written(self) -> bool:
        """Return whether it is complete."""
        return (self.folder / _COUNTS).exists()

    @property
    def is_current(self) -> bool:
        """Return `is_written`: its folder has another name if the part was written again."""
        return self.is_written

    @property
    def rows(self) -> int:
        """Return the number of its rows."""
        return self.part.rows - len(self.skipped)

    def write(self, folder: Path, evaluations: Evaluations) -> None:
        """Write the rows that stay."""
        good = _write_rows(self._tables(), folder)
        (folder / _COUNTS).write_text(json.dumps({"good": good}))

    def _tables(self) -> Iterator[Any]:
        import pyarrow as pa

        start = 0
        for table in _written_tables(self.part.folder):
            first, last = np.searchsorted(self.skipped, (start, start + len(table)))
            stays = np.ones(len(table), bool)
            stays[self.skipped[first:last] - start] = False
            start += len(table)
            yield table.filter(pa.array(stays))


@dataclass(frozen=True)
class MakeWriter:
    """Makes a worker that writes parts.

    Args:
        evaluations: titles and contents of the sources whose rows are excluded.
    """

    evaluations: Evaluations = ()

    def __call__(self) -> Callable[[Part | ReducedPart], None]:
        return partial(_write, evaluations=self.evaluations)


def _write(part: Part | ReducedPart, evaluations: Evaluations) -> None:
    """Write a part, whole or not at all.

    Raises:
        DataError: if it cannot be written.
    """
    if part.is_written:  # by an actor that was killed before it could say so
        return
    scratch = None
    try:
        scratch = Path(tempfile.mkdtemp(prefix=f"{part.folder.name}.", dir=part.folder.parent))
        part.write(scratch, evaluations)
        os.rename(scratch, part.folder)
    except OSError as error:
        raise DataError(f"Cannot write to {part.shown} ({first_line(error)}); free space or choose another.") from error
    finally:
        if scratch is not None and scratch.exists():
            with suppress(OSError, DataError):  # it stays if others put a file there
                remove_part(scratch)


def is_foreign(path: Path) -> bool:
    """Return whether something in the folder of a part was not written by a run."""
    return not _PART_FILE.fullmatch(path.name) or path.is_symlink() or not path.is_file()


def remove_part(folder: Path) -> None:
    """Remove the folder of a part.

    Raises:
        DataError: if it holds anything that a run does not write.
    """
    files = sorted(folder.iterdir())
    foreign = [path for path in files if is_foreign(path)]
    if folder.is_symlink() or not PART_NAME.fullmatch(folder.name) or foreign:
        other = foreign[0] if foreign else folder
        raise DataError(f"'{other}' was not written by Bifocal. Move it away and run the command again.")
    (folder / _COUNTS).unlink(missing_ok=True)  # first: without it, the part counts as not written
    for path in files:  # those that were looked at: a file that came since keeps the folder
        path.unlink(missing_ok=True)
    folder.rmdir()


def row_files(folder: Path) -> list[Path]:
    """Return the files with the rows of a part."""
    return sorted(folder.glob("*.parquet"))


def _write_rows(tables: Iterable[Any], folder: Path) -> int:
    """Write Arrow tables as Parquet files and return the number of rows."""
    from pyarrow.parquet import ParquetWriter

    good = number = held = 0
    writer: Any = None
    try:
        for table in tables:
            while table.num_rows:
                if writer is None:
                    writer = ParquetWriter(folder / f"{number:05}.parquet", table.schema)
                    number, held = number + 1, 0
                rows = table.slice(0, _ROWS - held)
                writer.write_table(rows)
                table = table.slice(rows.num_rows)
                good, held = good + rows.num_rows, held + rows.num_rows
                if held == _ROWS:
                    writer.close()
                    writer = None
    finally:
        if writer is not None:
            writer.close()
    return good


class _Recorder(SkipLog):
    """Writes the name of each good row, and all about each skipped one, to files.

    Args:
        skips, names: text files; without the second one, names are not written.
    """

    def __init__(self, skips: Any, names: Any) -> None:
        super().__init__()
        self.skips, self.names = skips, names

    def add(self, task: str, rows: int, skips: Iterable[SkippedRow] = (), shards: int = 0) -> None:
        skips = list(skips)
        self.skips.writelines(json.dumps(skip, ensure_ascii=False) + "\n" for skip in skips)
        super().add(task, rows, skips, shards)

    def add_good(self, task: str, name: str) -> None:
        """Add a good row."""
        if self.names is not None:
            self.names.write(json.dumps(name) + "\n")
        super().add(task, 1)


class _StampedImages:
    """Normalises rows, and writes path, size and time of each row's image file, whether its row is skipped or not."""

    def __init__(self, normalise: Callable[..., dict[str, Any]], images: Any) -> None:
        self.normalise, self.images = normalise, images

    def __call__(self, *args: Any) -> dict[str, Any]:
        row = self.normalise(*args)
        if isinstance(row.get("image"), str):
            self.images.write(json.dumps(file_stamp(row["image"])) + "\n")
        return row


def _tables(part: Part, recorder: _Recorder, images: Any) -> Iterator[Any]:
    """Yield the good rows of a part as Arrow tables that hold their images.

    Args:
        images: text file for the state of each image file.
    """
    import pyarrow as pa
    from datasets.table import embed_table_storage

    if part.features is None:
        source = part.sources[0].model_copy(update={"max_bad_fraction": 1.0})  # judged with the other parts
        data = load_source(source, part.kind, 0, recorder, part.name).with_format("arrow")
        schema = data.features.arrow_schema
        for rows in data.iter(_GROUP):
            yield embed_table_storage(rows.cast(schema))
        return
    schema = part.features.arrow_schema
    for source in part.sources:
        stream = open_stream(source, part.kind)
        assert stream is not None  # by `clean_copy`
        pipeline: Any = stream.normalise
        pipeline.normalise = _StampedImages(pipeline.normalise, images)
        held: list[dict[str, Any]] = []
        lost = 0
        for name, row in uniform_rows(stream, source, part.features):
            if isinstance(row, RowError):
                lost += row.file_lost
                recorder.add(part.name, 1, [SkippedRow.of(name, row)])
                continue
            recorder.add_good(part.name, name)
            held.append({column: row[column] for column in part.features})
            if len(held) == _GROUP:
                yield embed_table_storage(pa.Table.from_pylist(held, schema))
                held = []
        if held:
            yield embed_table_storage(pa.Table.from_pylist(held, schema))
        recorder.add(part.name, 0, shards=len(stream.shards) - lost)


def _written_tables(folder: Path) -> Iterator[Any]:
    """Yield the rows of a part that is written as Arrow tables."""
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile

    for path in row_files(folder):
        with ParquetFile(path) as file:
            for batch in file.iter_batches(_GROUP):
                yield pa.Table.from_batches([batch], file.schema_arrow)


def _plain_rows(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a part that is written, images as bytes."""
    for table in _written_tables(folder):
        yield from map(with_plain_image, table.to_pylist())
