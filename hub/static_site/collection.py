"""What a site has of an index: vectors in int8, and files of texts and thumbnails."""

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bifocal.embedding.items import KINDS
from bifocal.hub.search.index import SearchIndex
from bifocal.hub.search.ranking import sample_rows
from bifocal.hub.search.table import TableSnapshot

_VECTORS_SIZE = 32 * 2**20  # bytes of a file of vectors; hosts refuse large files
_PACK_SIZE = 128 * 2**10  # bytes of a file of items, which a hit loads: few files, and little to load
_LONGEST_TEXT = 600  # characters that a hit shows
_NAMES = 20  # of an item that several files hold
_LEVELS = 127


@dataclass
class Pack:
    """A file of consecutive items: names, texts and thumbnails.

    The file is the length of a JSON list (4 bytes, little-endian), the list, and the bytes of all thumbnails. An entry
    of the list has `name`, `other_names`, `others` (their number), `text`, and `thumbnail` (`start`, `bytes`) or null.
    """

    entries: list[dict[str, Any]] = field(default_factory=list)
    thumbnails: bytearray = field(default_factory=bytearray)
    size: int = 0

    def add(self, row: dict[str, Any]) -> None:
        names = list(dict.fromkeys(occurrence["name"] for occurrence in row["occurrences"]))
        others = [name for name in names if name != row["name"]]
        text = row["text"]
        thumbnail = None if row["image"] is None else row["image"]["bytes"]
        entry = {
            "name": row["name"], "other_names": others[:_NAMES], "others": len(others),
            "text": text if len(text) <= _LONGEST_TEXT else f"{text[:_LONGEST_TEXT]}…",
            "thumbnail": None if thumbnail is None else {"start": len(self.thumbnails), "bytes": len(thumbnail)},
        }  # fmt: skip
        self.entries.append(entry)
        self.thumbnails += thumbnail or b""
        self.size += len(json.dumps(entry)) + len(thumbnail or b"")

    def content(self) -> bytes:
        entries = json.dumps(self.entries, separators=(",", ":")).encode()
        return struct.pack("<I", len(entries)) + entries + self.thumbnails


def quantize(vectors: np.ndarray) -> np.ndarray:
    """Return vectors (rows, dimensions) in int8, each scaled so that its largest number is 127."""
    largest = np.maximum(np.abs(vectors).max(axis=1, keepdims=True), 1e-12)
    return np.rint(vectors / largest * _LEVELS).astype(np.int8)


def write_collection(index: SearchIndex, snapshot: TableSnapshot, site: Path) -> dict[str, Any]:
    """Write the vectors and items of an index into the folder `data` of a site; return what `site.json` says of them.

    Returns:
        `rows`, `dimensions`, `vectors` (files with their first row), `items` (first row and bytes of each pack) and
        `samples`, the rows by which scores of both kinds are made comparable (see `Calibration`).
    """
    (site / "data" / "items").mkdir(parents=True)
    kinds = np.array([kind for table in snapshot.tables for kind in table.column("kind").to_pylist()], dtype=object)
    (site / "data" / "kinds.bin").write_bytes(bytes(KINDS.index(kind) for kind in kinds))
    return {
        "rows": len(kinds), "dimensions": index.dimensions, "vectors": _write_vectors(index, snapshot, site),
        "items": _write_items(snapshot, site / "data" / "items"),
        "samples": {kind: rows.tolist() for kind, rows in sample_rows(kinds).items()},
    }  # fmt: skip


def _write_vectors(index: SearchIndex, snapshot: TableSnapshot, site: Path) -> list[dict[str, Any]]:
    """Write the vectors in files of whole rows, and return the name and the first row of each."""
    per_file = max(1, _VECTORS_SIZE // index.dimensions)
    files: list[dict[str, Any]] = []
    row = 0
    for vectors in map(quantize, snapshot.vectors()):
        while len(vectors):
            if row == len(files) * per_file:
                files.append({"file": f"data/vectors-{len(files):03d}.bin", "first_row": row})
            written = vectors[: len(files) * per_file - row]
            with (site / files[-1]["file"]).open("ab") as file:
                file.write(written.tobytes())
            row += len(written)
            vectors = vectors[len(written) :]
    return files


def _write_items(snapshot: TableSnapshot, folder: Path) -> dict[str, list[int]]:
    first_rows, sizes = [], []
    for first_row, pack in _packs(snapshot):
        content = pack.content()
        (folder / f"{len(sizes):06d}.bin").write_bytes(content)
        first_rows.append(first_row)
        sizes.append(len(content))
    return {"first_rows": first_rows, "bytes": sizes}


def _packs(snapshot: TableSnapshot) -> Iterator[tuple[int, Pack]]:
    """Yield packs of about the same size with the number of their first row."""
    pack, first_row = Pack(), 0
    for row in _rows(snapshot):
        if pack.size > _PACK_SIZE:
            yield first_row, pack
            first_row += len(pack.entries)
            pack = Pack()
        pack.add(row)
    yield first_row, pack


def _rows(snapshot: TableSnapshot) -> Iterator[dict[str, Any]]:
    for table in snapshot.tables:
        yield from table.select(["name", "text", "image", "occurrences"]).to_pylist()
