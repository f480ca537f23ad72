"""The table of an index: Arrow files of rows, each written whole, which `datasets` reads without a copy."""

import mmap
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bifocal.errors import first_line
from bifocal.hub.search.items import SearchError

ROWS = 1024  # of a part; what a killed run loses at most
_PART = re.compile(r"part-(\d{6,})\.arrow")
_END = b"\xff\xff\xff\xff\x00\x00\x00\x00"  # of an Arrow stream; one that was cut lacks it
_FAR = 0.01  # how far from 1 the length of a stored vector may be


class Place(NamedTuple):
    """Where a row's content was found.

    Args:
        source: number of a source of the index; -1 for items that were added without one.
        name: within the source: a path relative to its folder, or a file and row.
        text: of an image, its caption there; empty for a text.
    """

    source: int
    name: str
    text: str


@dataclass
class Snapshot:
    """The rows of a table at one moment; what other processes write later does not change them.

    Args:
        stamp: of the parts, see `Table.stamp`.
        parts: their files.
        tables: the rows of each part, memory-mapped.
    """

    stamp: list[list[Any]]
    parts: list[Path]
    tables: list[Any]

    @property
    def rows(self) -> Any:
        import pyarrow as pa

        return pa.concat_tables(self.tables)

    def vectors(self) -> Iterator[np.ndarray]:
        """Yield the embeddings (rows, dimensions) of each part.

        Raises:
            SearchError: if one is not of length 1, which no part that was written has.
        """
        for part, table in zip(self.parts, self.tables, strict=True):
            # Slices know their offset only through flatten.
            flat = table.column("embedding").combine_chunks().flatten()
            vectors = flat.to_numpy(zero_copy_only=False).reshape(
                len(table), table.schema.field("embedding").type.list_size
            )
            require_unit(vectors, part)
            yield vectors


def require_unit(vectors: np.ndarray, part: Path) -> None:
    with np.errstate(all="ignore"):
        lengths = np.sqrt(np.einsum("nd,nd->n", vectors, vectors))
    if not (np.abs(lengths - 1.0) < _FAR).all():
        raise damaged(part, "it holds numbers that no embedding has")


def damaged(part: Path, why: str) -> SearchError:
    return SearchError(f"'{part}' is damaged: {why}. Delete this file and run bifocal index again with its sources.")


class Table:
    """Rows of `key`, `kind`, `name`, `text`, `image` (a thumbnail), `places` and `embedding` (unit vectors, float32).

    `name` and `text` are those of all places together, as hits show them. A part stays when its last row is deleted, so
    that a missing one is noticed.

    Args:
        folder: of the parts.
        dimensions: of the vectors.
    """

    def __init__(self, folder: Path, dimensions: int) -> None:
        self.folder, self.dimensions = folder, dimensions

    @cached_property
    def schema(self) -> Any:
        from datasets import Features, Image, List, Value

        text = Value("large_string")
        return Features(
            {"key": text, "kind": Value("string"), "name": text, "text": text, "image": Image(),
             "places": List({"source": Value("int32"), "name": text, "text": text}),
             "embedding": List(Value("float32"), length=self.dimensions)}
        ).arrow_schema  # fmt: skip

    @property
    def parts(self) -> list[Path]:
        return [path for _, path in sorted(self._numbered().items())]

    def _numbered(self) -> dict[int, Path]:
        try:
            names = os.listdir(self.folder)
        except FileNotFoundError:
            return {}
        return {int(match[1]): self.folder / match[0] for match in map(_PART.fullmatch, names) if match}

    def missing(self, count: int) -> list[str]:
        """Return the names of parts that are lost, where so many were written."""
        numbers = self._numbered()
        return [_name(n) for n in range(max([count, *(n + 1 for n in numbers)])) if n not in numbers]

    def stamp(self) -> list[list[Any]]:
        """Return what changes with the table."""
        found = []
        for part in self.parts:
            about = part.stat()
            found.append([part.name, about.st_size, about.st_mtime_ns, about.st_ino])
        return found

    def open(self) -> Snapshot:
        """Return all rows.

        Raises:
            SearchError: if a part is damaged or of another index, or if the table changes again and again.
        """
        for _ in range(10):
            stamp = self.stamp()
            parts = self.parts
            tables = [self._read(part) for part in parts]
            if self.stamp() == stamp:
                return Snapshot(stamp, parts, tables)
        raise SearchError(f"'{self.folder}' is being changed all the time; try again later.")

    def _read(self, part: Path) -> Any:
        import pyarrow as pa

        try:
            with part.open("rb") as file:
                # Not Arrow's own mapping, which takes no path that is not UTF-8.
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            if mapped[-len(_END) :] != _END:
                raise damaged(part, "its end is missing")
            table = pa.ipc.open_stream(pa.py_buffer(mapped)).read_all()
            # Offsets out of bounds would end the process.
            table.validate(full=True)
        except PermissionError as error:
            raise SearchError(f"'{part}' may not be read; change its permissions.") from error
        except SearchError:
            raise
        except (pa.ArrowException, OSError, ValueError) as error:  # an empty file is a ValueError of mmap
            problem = first_line(error)[:120]
            raise damaged(part, f"it is no Arrow stream that can be read ({problem})") from error
        if not table.schema.equals(self.schema):
            names = table.schema.names
            width = getattr(table.schema.field("embedding").type, "list_size", 0) if "embedding" in names else 0
            if width and width != self.dimensions:
                raise SearchError(
                    f"'{part}' holds vectors of {width} dimensions, but this index has {self.dimensions}: it is of "
                    "another index. Move it away and run bifocal index again."
                )
            raise SearchError(
                f"'{part}' has other columns than an index has; move it away and run bifocal index again."
            )
        return table

    def append(self, rows: Sequence[Mapping[str, Any]]) -> int:
        """Write rows as a new part, whole or not at all; return the number of parts.

        Args:
            rows: with `key`, `kind`, `text` (of a text), `image` (bytes of a thumbnail or None), `places`, `embedding`.
        """
        import pyarrow as pa

        count = max(self._numbered(), default=-1) + 1
        shown = [_shown(row["kind"], row["text"], row["places"]) for row in rows]
        thumbnails = [None if row["image"] is None else {"bytes": row["image"], "path": None} for row in rows]
        vectors = np.concatenate([np.asarray(row["embedding"], np.float32) for row in rows])
        columns = {
            "key": [row["key"] for row in rows], "kind": [row["kind"] for row in rows],
            "name": [name for name, _ in shown], "text": [text for _, text in shown], "image": thumbnails,
            "places": [[place._asdict() for place in row["places"]] for row in rows],
        }  # fmt: skip
        schema = self.schema
        arrays = [pa.array(values, schema.field(name).type) for name, values in columns.items()]
        flat = pa.FixedSizeListArray.from_arrays(pa.array(vectors), self.dimensions)
        self._write(self.folder / _name(count), pa.table([*arrays, flat.cast(schema.field("embedding").type)], schema))
        return count + 1

    def fill(self, name: str) -> None:
        """Write an empty part in the place of a lost one."""
        self._write(self.folder / name, self.schema.empty_table())

    def rewrite(self, places: Callable[[str, str, list[Place]], list[Place]]) -> int:
        """Change where rows come from, and delete those that come from nowhere any more, part by part.

        Args:
            places: from the key, kind and places of a row to its new places.

        Returns:
            How many rows were deleted.
        """
        import pyarrow as pa

        deleted = 0
        found = self.open()
        for part, table in zip(found.parts, found.tables, strict=True):
            before = [_places(row) for row in table.column("places").to_pylist()]
            keys, kinds = table.column("key").to_pylist(), table.column("kind").to_pylist()
            after = [places(*row) for row in zip(keys, kinds, before, strict=True)]
            if after == before:
                continue
            kept = [row for row, now in enumerate(after) if now]
            deleted += len(after) - len(kept)
            # Rows stay Arrow: a thumbnail that is decoded and encoded again gets worse each time.
            table = table.take(pa.array(kept, pa.int64()))
            texts = table.column("text").to_pylist()
            shown = [_shown(kinds[row], texts[number], after[row]) for number, row in enumerate(kept)]
            columns = {
                "name": [name for name, _ in shown], "text": [text for _, text in shown],
                "places": [[place._asdict() for place in after[row]] for row in kept],
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
        scratch = part.with_name(f".{part.name}")
        with scratch.open("wb") as file:
            with pa.ipc.new_stream(file, self.schema) as writer:
                # A reader of no batch at all would know no columns.
                for batch in table.to_batches() or [pa.RecordBatch.from_pylist([], schema=self.schema)]:
                    writer.write_batch(batch)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, part)

    def tidy(self) -> None:
        """Delete what a killed run left half written; only for who holds the index's lock."""
        for left in self.folder.glob(".part-*.arrow"):
            left.unlink(missing_ok=True)


def all_places(snapshot: Snapshot) -> Iterator[tuple[str, list[Place]]]:
    """Yield key and places of every row."""
    for table in snapshot.tables:
        for key, found in zip(table.column("key").to_pylist(), table.column("places").to_pylist(), strict=True):
            yield key, _places(found)


def _places(found: list[dict[str, Any]]) -> list[Place]:
    return [Place(one["source"], one["name"], one["text"]) for one in found]


def _shown(kind: str, text: str, places: Sequence[Place]) -> tuple[str, str]:
    """Name and text of a hit: the first name, and of an image every caption."""
    if kind == "image":
        text = " · ".join(dict.fromkeys(place.text for place in places if place.text))
    return places[0].name, text


def _name(number: int) -> str:
    return f"part-{number:06d}.arrow"
