"""What a site has of an index: vectors in int8, and files of texts and thumbnails."""

import json
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bifocal.hub.search.captions import Captions, find_captions
from bifocal.hub.search.index import SearchIndex
from bifocal.hub.search.ranking import sample_rows
from bifocal.hub.search.table import TableSnapshot

_VECTORS_SIZE = 32 * 2**20  # bytes of a file of vectors; hosts refuse large files
_PACK_SIZE = 128 * 2**10  # bytes of a file of items, which a hit loads: few files, and little to load
_LONGEST_TEXT = 600  # characters that a hit shows
_NAMES = 20  # of an item that several files hold
_LEVELS = 127
_IMAGE, _TEXT, _CAPTION, _CAPTION_AND_TEXT = range(4)  # groups of rows


@dataclass
class Pack:
    """A file of consecutive items: names, texts and thumbnails.

    The file is the length of a JSON list (4 bytes, little-endian), the list, and the bytes of all thumbnails. An entry
    of the list has `name`, `other_names`, `others` (their number), `text`, and `thumbnail` (`start`, `bytes`) or null.
    """

    entries: list[dict[str, Any]] = field(default_factory=list)
    thumbnails: bytearray = field(default_factory=bytearray)
    size: int = 0

    def add(self, names: Sequence[str], text: str, thumbnail: bytes | None) -> None:
        others = names[1:]
        entry = {
            "name": names[0], "other_names": others[:_NAMES], "others": len(others),
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
        `rows`, `dimensions`, `vectors` (files with their first row), `items` (first row and bytes of each pack),
        `samples`, the rows by which scores of both kinds are made comparable (see `Calibration`), and `counts`.
    """
    data = site / "data"
    (data / "items").mkdir(parents=True)
    kinds = np.array(snapshot.rows.column("kind").to_pylist(), dtype=object)
    captions = find_captions(snapshot.rows)
    is_both = captions.is_caption & captions.is_text
    groups = np.select([kinds == "image", is_both, captions.is_caption], [_IMAGE, _CAPTION_AND_TEXT, _CAPTION], _TEXT)
    (data / "groups.dat").write_bytes(groups.astype(np.uint8).tobytes())
    pairs = [(caption, image) for caption, images in captions.images.items() for image in images]
    (data / "captions.dat").write_bytes(np.array(pairs, "<i4").tobytes())
    return {
        "rows": len(kinds), "dimensions": index.dimensions, "vectors": _write_vectors(index, snapshot, site),
        "items": _write_items(snapshot, captions, data / "items"),
        "counts": {
            name: int(mask.sum())
            for name, mask in (
                ("image", kinds == "image"), ("text", captions.is_text), ("caption", captions.is_caption),
            )
        },
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
                files.append({"file": f"data/vectors-{len(files):03d}.dat", "first_row": row})
            written = vectors[: len(files) * per_file - row]
            with (site / files[-1]["file"]).open("ab") as file:
                file.write(written.tobytes())
            row += len(written)
            vectors = vectors[len(written) :]
    return files


def _write_items(snapshot: TableSnapshot, captions: Captions, folder: Path) -> dict[str, list[int]]:
    first_rows: list[int] = []
    sizes: list[int] = []
    for first_row, pack in _packs(snapshot, captions):
        content = pack.content()
        (folder / f"{len(sizes):06d}.dat").write_bytes(content)
        first_rows.append(first_row)
        sizes.append(len(content))
    return {"first_rows": first_rows, "bytes": sizes}


def _packs(snapshot: TableSnapshot, captions: Captions) -> Iterator[tuple[int, Pack]]:
    """Yield packs of about the same size with the number of their first row."""
    pack, first_row = Pack(), 0
    for number, row in enumerate(_rows(snapshot)):
        if pack.size > _PACK_SIZE:
            yield first_row, pack
            first_row += len(pack.entries)
            pack = Pack()
        names = dict.fromkeys([row["name"], *(occurrence["name"] for occurrence in row["occurrences"])])
        thumbnail = None if row["image"] is None else row["image"]["bytes"]
        # The other names of a text that is a caption, too, are those of captions.
        pack.add(captions.text_names.get(number) or tuple(names), row["text"], thumbnail)
    yield first_row, pack


def _rows(snapshot: TableSnapshot) -> Iterator[dict[str, Any]]:
    for table in snapshot.tables:
        yield from table.select(["name", "text", "image", "occurrences"]).to_pylist()
