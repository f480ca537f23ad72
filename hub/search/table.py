"""The table of an index: Arrow files of rows, which `datasets` reads without a copy."""

import mmap
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bifocal.errors import first_line
from bifocal.hub.search.atomic import replace_file, temporary_files
from bifocal.hub.search.hits import SearchError

ROWS = 1024  # per part; a killed run loses at most as many
CAPTION_SEPARATOR = " · "  # between the captions of an image
_PART = re.compile(r"part-(\d{6,})\.arrow")
_END_OF_STREAM = b"\xff\xff\xff\xff\x00\x00\x00\x00"  # a truncated Arrow stream lacks it
_LENGTH_TOLERANCE = 0.01  # of stored vectors, which have length 1


class Occurrence(NamedTuple):
    """Where a row's content occurs.

    Args:
        source: number of the source in the index; -1 for items that were added without one.
        name: name within the source: a path relative to its folder, or a file and row.
        text: caption of an image there; empty for a text.
    """

    source: int
    name: str
    text: str


@dataclass
class TableSnapshot:
    """The rows of a table at one moment. What other processes write later does not change them.

    Args:
        stamp: state of the parts, see `Table.stamp`.
        parts: files.
        tables: memory-mapped rows of each part.
    """

    stamp: list[list[Any]]
    parts: list[Path]
    tables: list[Any]

    @property
    def rows(self) -> Any:
        """All rows as one Arrow table."""
        import pyarrow as pa

        return pa.concat_tables(self.tables)

    def vectors(self) -> Iterator[np.ndarray]:
        """Yield the embeddings (rows, dimensions) of each part.

        Raises:
            SearchError: if one is not of length 1, so that its part is damaged.
        """
        for part, table in zip(self.parts, self.tables, strict=True):
            # Slices know their offset only through flatten.
            flat = table.column("embedding").combine_chunks().flatten()
            vectors = flat.to_numpy(zero_copy_only=False).reshape(
                len(table), table.schema.field("embedding").type.list_size
            )
            require_unit_length(vectors, part)
            yield vectors


def require_unit_length(vectors: np.ndarray, part: Path) -> None:
    """Check that all vectors of a part have length 1.

    Raises:
        SearchError: if vectors of a part have other lengths than 1.
    """
    if not have_unit_length(vectors):
        raise _damaged(part, "it holds numbers that no embedding has")


def have_unit_length(vectors: np.ndarray) -> bool:
    """Return whether all stored vectors (rows, dimensions) have length 1, as they had when they were written."""
    with np.errstate(all="ignore"):
        lengths = np.sqrt(np.einsum("nd,nd->n", vectors, vectors))
    return bool((np.abs(lengths - 1.0) < _LENGTH_TOLERANCE).all())


def _damaged(part: Path, reason: str) -> SearchError:
    return SearchError(f"'{part}' is damaged: {reason}. Delete this file and run bifocal index again with its sources.")


class Table:
    """A folder of parts: Arrow files of rows, each written whole.

    Columns are `key`, `kind`, `name`, `text`, `image` (a thumbnail), `occurrences` and `embedding` (unit vectors in
    float32). `name` and `text` combine all occurrences, as hits show them. A part stays when its last row is deleted,
    so that a missing part is noticed.

    Args:
        folder: folder of the parts.
        dimensions: length of the vectors.
    """

    def __init__(self, folder: Path, dimensions: int) -> None:
        self.folder, self.dimensions = folder, dimensions

    @cached_property
    def schema(self) -> Any:
        """The Arrow schema of a part, with the metadata by which `datasets` decodes thumbnails."""
        from datasets import Features, Image, List, Value

        text = Value("large_string")
        return Features(
            {"key": text, "kind": Value("string"), "name": text, "text": text, "image": Image(),
             "occurrences": List({"source": Value("int32"), "name": text, "text": text}),
             "embedding": List(Value("float32"), length=self.dimensions)}
        ).arrow_schema  # fmt: skip

    @property
    def parts(self) -> list[Path]:
        """Files of the parts, in order."""
        return [path for _, path in sorted(self._numbered().items())]

    def _numbered(self) -> dict[int, Path]:
        try:
            names = os.listdir(self.folder)
        except FileNotFoundError:
            return {}
        return {int(match[1]): self.folder / match[0] for match in map(_PART.fullmatch, names) if match}

    def missing(self, count: int) -> list[str]:
        """Return the names of missing parts.

        Args:
            count: number of parts that were written.
        """
        numbers = self._numbered()
        return [_part_name(n) for n in range(max([count, *(n + 1 for n in numbers)])) if n not in numbers]

    def stamp(self) -> list[list[Any]]:
        """Return the state of the parts: it differs if the table does."""
        stamp = []
        for part in self.parts:
            status = part.stat()
            stamp.append([part.name, status.st_size, status.st_mtime_ns, status.st_ino])
        return stamp

    def open(self) -> TableSnapshot:
        """Return all rows.

        Raises:
            SearchError: if a part is damaged or of another index, or if the table changes again and again.
        """
        for _ in range(10):
            stamp = self.stamp()
            parts = self.parts
            tables = [self._read(part) for part in parts]
            if self.stamp() == stamp:
                return TableSnapshot(stamp, parts, tables)
        raise SearchError(f"'{self.folder}' keeps changing. Try again later.")

    def _read(self, part: Path) -> Any:
        import pyarrow as pa

        try:
            with part.open("rb") as file:
                # Not Arrow's own mapping, which refuses paths that are not UTF-8.
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            if mapped[-len(_END_OF_STREAM) :] != _END_OF_STREAM:
                raise _damaged(part, "its end is missing")
            table = pa.ipc.open_stream(pa.py_buffer(mapped)).read_all()
            # Offsets out of bounds would end the process.
            table.validate(full=True)
        except PermissionError as error:
            raise SearchError(f"'{part}' may not be read. Change its permissions.") from error
        except SearchError:
            raise
        except (pa.ArrowException, OSError, ValueError) as error:  # an empty file is a ValueError of mmap
            raise _damaged(part, f"it cannot be read as an Arrow stream ({first_line(error)[:120]})") from error
        if not table.schema.equals(self.schema):
            names = table.schema.names
            width = getattr(table.schema.field("embedding").type, "list_size", 0) if "embedding" in names else 0
            if width and width != self.dimensions:
                raise SearchError(
                    f"'{part}' is of another index: it has {width} dimensions, not {self.dimensions}. Move it away and "
                    "run bifocal index again."
                )
            raise SearchError(
                f"'{part}' has other columns than the part of an index. Move it away and run bifocal index again."
            )
        return table

    def append(self, rows: Sequence[Mapping[str, Any]]) -> int:
        """Write rows as a new part and return the number of parts.

        Args:
            rows: with `key`, `kind`, `text` (of a text), `image` (bytes of a thumbnail or None), `occurrences`
                and `embedding`.
        """
        import pyarrow as pa

        count = max(self._numbered(), default=-1) + 1
        shown = [_name_and_text(row["kind"], row["text"], row["occurrences"]) for row in rows]
        thumbnails = [None if row["image"] is None else {"bytes": row["image"], "path": None} for row in rows]
        vectors = np.concatenate([np.asarray(row["embedding"], np.float32) for row in rows])
        columns = {
            "key": [row["key"] for row in rows], "kind": [row["kind"] for row in rows],
            "name": [name for name, _ in shown], "text": [text for _, text in shown], "image": thumbnails,
            "occurrences": [[item._asdict() for item in row["occurrences"]] for row in rows],
        }  # fmt: skip
        schema = self.schema
        arrays = [pa.array(values, schema.field(name).type) for name, values in columns.items()]
        flat = pa.FixedSizeListArray.from_arrays(pa.array(vectors), self.dimensions)
        self._write(
            self.folder / _part_name(count), pa.table([*arrays, flat.cast(schema.field("embedding").type)], schema)
        )
        return count + 1

    def fill(self, name: str) -> None:
        """Write an empty part for a missing one."""
        self._write(self.folder / name, self.schema.empty_table())

    def rewrite(self, update: Callable[[str, str, list[Occurrence]], list[Occurrence]]) -> int:
        """Update the occurrences of rows, part by part, and delete rows without any; return the number deleted.

        Args:
            update: from the key, kind and occurrences of a row to its new occurrences.
        """
        import pyarrow as pa

        deleted = 0
        snapshot = self.open()
        for part, table in zip(snapshot.parts, snapshot.tables, strict=True):
            before = [_occurrences(row) for row in table.column("occurrences").to_pylist()]
            keys, kinds = table.column("key").to_pylist(), table.column("kind").to_pylist()
            after = [update(*row) for row in zip(keys, kinds, before, strict=True)]
            if after == before:
                continue
            kept = [row for row, occurrences in enumerate(after) if occurrences]
            deleted += len(after) - len(kept)
            # Rows stay Arrow: a thumbnail that is decoded and encoded again gets worse each time.
            table = table.take(pa.array(kept, pa.int64()))
            texts = table.column("text").to_pylist()
            shown = [_name_and_text(kinds[row], texts[number], after[row]) for number, row in enumerate(kept)]
            columns = {
                "name": [name for name, _ in shown], "text": [text for _, text in shown],
                "occurrences": [[item._asdict() for item in after[row]] for row in kept],
            }  # fmt: skip
            for name, values in columns.items():
                number = self.schema.get_field_index(name)
                table = table.set_column(
                    number, self.schema.field(name), pa.array(values, self.schema.field(name).type)
                )
            self._write(part, table)
        return deleted

    def _write(self, part: Path, table: Any) -> None:
        import pyarrow as pa

        self.folder.mkdir(parents=True, exist_ok=True)
        with (
            replace_file(part) as temporary,
            temporary.open("wb") as file,
            pa.ipc.new_stream(file, self.schema) as writer,
        ):
            # Readers know no columns without at least one batch.
            for batch in table.to_batches() or [pa.RecordBatch.from_pylist([], schema=self.schema)]:
                writer.write_batch(batch)

    def delete_temporary_files(self) -> None:
        """Delete the unfinished files of killed runs. The caller holds the index's lock."""
        for path in temporary_files(self.folder, "part-*.arrow"):
            path.unlink(missing_ok=True)


def all_occurrences(snapshot: TableSnapshot) -> Iterator[tuple[str, list[Occurrence]]]:
    """Yield key and occurrences of every row."""
    for table in snapshot.tables:
        rows = zip(table.column("key").to_pylist(), table.column("occurrences").to_pylist(), strict=True)
        yield from ((key, _occurrences(occurrences)) for key, occurrences in rows)


def _occurrences(values: list[dict[str, Any]]) -> list[Occurrence]:
    return [Occurrence(value["source"], value["name"], value["text"]) for value in values]


def _name_and_text(kind: str, text: str, occurrences: Sequence[Occurrence]) -> tuple[str, str]:
    """Return what a hit shows: the first name, and the text or all captions of an image."""
    if kind == "image":
        text = join_captions(dict.fromkeys(item.text for item in occurrences if item.text))
    return occurrences[0].name, text


def join_captions(captions: Iterable[str]) -> str:
    """Return the text of an image with several captions."""
    return CAPTION_SEPARATOR.join(captions)


def _part_name(number: int) -> str:
    return f"part-{number:06d}.arrow"
