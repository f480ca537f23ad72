"""The table that `bifocal embed` writes: its columns, and vectors at the chosen length and precision."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from bifocal.embedding.embed import EmbeddedItem
from bifocal.embedding.items import normalize
from bifocal.hub.embed.settings import RunSettings

_TYPES = {"float32": pa.float32(), "float16": pa.float16(), "int8": pa.int8()}
INT8_SCALE = 127


def schema(settings: RunSettings) -> pa.Schema:
    """Return the columns.

    `key` is a hash of the content, equal for equal images or texts; `kind` "image" or "text"; `name` the path relative
    to the source, or file and row; `text` the text, or the captions of an image; `address` the file of an image, None
    for images inside shards; `image` a thumbnail (PNG or JPEG); `weights` the hash of the model's weights.
    """
    vector = pa.list_(_TYPES[settings.precision], settings.dimensions)
    return pa.schema(
        [("key", pa.string()), ("kind", pa.string()), ("name", pa.string()), ("text", pa.string()),
         ("address", pa.string()), ("image", pa.binary()), ("vector", vector), ("weights", pa.string())]
    )  # fmt: skip


def row(key: str, embedded: EmbeddedItem) -> dict[str, Any]:
    """Return an embedded item as a row, without the content of its file."""
    item = embedded.item
    address = str(item.image) if isinstance(item.image, str | Path) else None
    return {
        "key": key, "kind": item.kind, "name": item.name, "text": item.text, "address": address,
        "image": embedded.thumbnail, "vector": embedded.vector,
    }  # fmt: skip


def to_table(rows: Sequence[dict[str, Any]], settings: RunSettings) -> pa.Table:
    """Return rows as a table, with vectors at the length and precision of a run."""
    columns = schema(settings)
    vectors = np.empty((0, settings.dimensions), np.float32)
    if rows:
        vectors = quantize(np.stack([one["vector"] for one in rows]), settings.dimensions, settings.precision)
    names = ("key", "kind", "name", "text", "address", "image")
    arrays = [pa.array([one[name] for one in rows], columns.field(name).type) for name in names]
    flat = pa.array(vectors.ravel(), _TYPES[settings.precision])
    arrays += [
        pa.FixedSizeListArray.from_arrays(flat, settings.dimensions),
        pa.array([settings.weights] * len(rows), pa.string()),
    ]
    return pa.table(arrays, schema=columns)


def quantize(vectors: np.ndarray, dimensions: int, precision: str) -> np.ndarray:
    """Return the leading dimensions of unit vectors (items, all dimensions), of length 1 again, at a precision."""
    leading = normalize(vectors[:, :dimensions])
    if precision == "int8":
        return np.round(leading * INT8_SCALE).astype(np.int8)
    return leading.astype(precision)
