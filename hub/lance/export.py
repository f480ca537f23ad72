"""Writes the items of a local index to a LanceDB database."""

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from bifocal.hub.lance.parts import LanceParts
from bifocal.hub.search.captions import Captions, find_captions
from bifocal.hub.search.hits import SearchError
from bifocal.hub.search.index import SearchIndex

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True)
class _ExportSettings:
    """What decides the rows of an export."""

    index: SearchIndex

    def to_dict(self) -> dict[str, Any]:
        index = self.index
        return {
            "source": "index", "model": index.model, "weights": index.weights, "dimensions": index.dimensions,
            "precision": "float32", "dtype": index.dtype, "query_prompt": index.prompts.get("query", ""),
            "prompt": index.prompts.get("document", ""), "fast_decoding": index.fast_decoding,
        }  # fmt: skip


@dataclass
class ExportResult:
    """What an export did.

    Args:
        written: parts of the index that were written.
        unchanged: parts that were there.
        deleted: parts that the index no longer has.
        finished: what was built, in words.
    """

    written: int
    unchanged: int
    deleted: int
    finished: str


def export_to_lancedb(index: SearchIndex, uri: str) -> ExportResult:
    """Write an index's items to a LanceDB database, which holds them and nothing else then.

    Parts of the index that are there already are not written again.

    Args:
        uri: a folder, or an address that LanceDB knows.

    Raises:
        SearchError: if the index is empty or damaged, or the database holds items of another model or program.
    """
    snapshot = index.snapshot()
    if not sum(map(len, snapshot.tables)):
        raise SearchError(f"The index '{index.folder}' is empty; add something with bifocal index.")
    parts = LanceParts(uri)
    parts.start(_ExportSettings(index))
    before = parts.written()
    captions = find_captions(snapshot.rows)
    names = snapshot.rows.column("name")
    first_row, written = 0, []
    for path, table, vectors in zip(snapshot.parts, snapshot.tables, snapshot.vectors(), strict=True):
        rows = _rows(table, vectors, captions, names, first_row, index.weights)
        record = {"digest": _digest(rows)}
        if before.get(path.stem) != record:
            parts.write(path.stem, rows, record)
            written.append(path.stem)
        first_row += len(table)
    deleted = sorted(set(before) - {path.stem for path in snapshot.parts})
    parts.delete(deleted)
    return ExportResult(len(written), len(snapshot.parts) - len(written), len(deleted), parts.finish())


def _rows(
    table: "pa.Table", vectors: np.ndarray, captions: Captions, all_names: "pa.ChunkedArray", first_row: int,
    weights: str,
) -> "pa.Table":  # fmt: skip
    """Return the rows of a part of an index as `LanceParts` writes them.

    Args:
        captions: those of the whole index.
        all_names: name of each row of the index.
        first_row: row of the index that the part begins with.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    numbers = range(first_row, first_row + len(table))
    names, images = [], []
    for row, occurrences in zip(numbers, table.column("occurrences").to_pylist(), strict=True):
        of_text = captions.text_names.get(row)  # the other names are those of captions
        names.append(list(of_text or dict.fromkeys(occurrence["name"] for occurrence in occurrences)))
        images.append([all_names[image].as_py() for image in captions.images.get(row, ())])
    return pa.table(
        {
            "key": table.column("key"), "kind": table.column("kind"), "name": [of_row[0] for of_row in names],
            "names": names, "text": table.column("text"), "address": pa.nulls(len(table), pa.string()),
            "image": pc.struct_field(table.column("image"), "bytes"),
            "vector": pa.FixedSizeListArray.from_arrays(vectors.ravel(), vectors.shape[1]),
            "weights": [weights] * len(table), "image_names": pa.array(images, pa.list_(pa.string())),
            "is_text": captions.is_text[first_row : first_row + len(table)],
        }
    )  # fmt: skip


def _digest(rows: "pa.Table") -> str:
    """Return a hash of rows."""
    import pyarrow as pa

    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, rows.schema) as writer:
        writer.write_table(rows.combine_chunks())
    return hashlib.blake2b(sink.getvalue(), digest_size=16).hexdigest()
