"""Rows as `bifocal embed` writes them, with vectors that need no model."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from bifocal.embedding.items import normalize

DIMENSIONS = 16
WEIGHTS = "0123abcd"


@dataclass(frozen=True)
class Settings:
    """Settings of a run.

    Args:
        changes: what differs from the usual ones.
    """

    changes: tuple[tuple[str, Any], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        usual = {
            "source": {"path": "photos"}, "model": "models/a", "weights": WEIGHTS, "dimensions": DIMENSIONS,
            "precision": "float32", "dtype": "model", "query_prompt": "", "fast_decoding": False,
        }  # fmt: skip
        return usual | dict(self.changes)


def vectors(count: int, seed: int = 0) -> np.ndarray:
    return normalize(np.random.default_rng(seed).normal(size=(count, DIMENSIONS))).astype(np.float32)


def rows(part: str, count: int, seed: int = 0, dtype: Any = np.float32) -> pa.Table:
    """Return texts of a part with words of their own."""
    names = [f"{part}.jsonl:{row}" for row in range(count)]
    flat = pa.array(vectors(count, seed).astype(dtype).ravel())
    return pa.table(
        {
            "key": [f"{part}-{row:04d}" for row in range(count)], "kind": ["text"] * count, "name": names,
            "text": [f"zebra{row} of {part}" for row in range(count)], "address": pa.nulls(count, pa.string()),
            "image": pa.nulls(count, pa.binary()), "vector": pa.FixedSizeListArray.from_arrays(flat, DIMENSIONS),
            "weights": [WEIGHTS] * count,
        }
    )  # fmt: skip


def captioned(seed: int = 0) -> pa.Table:
    """Return three images with a caption each, and a text of its own; vectors of captions are those of the texts."""
    kinds = ["image", "text"] * 3 + ["text"]
    names = [name for photo in "abc" for name in (f"{photo}.png", f"{photo}.png#caption")] + ["notes.txt"]
    texts = [text for animal in ("a red fox", "a grey wolf", "a brown bear") for text in (animal, animal)] + ["a fox"]
    table = rows("photos", 7, seed)
    for number, (name, values) in enumerate({"kind": kinds, "name": names, "text": texts}.items(), 1):
        table = table.set_column(number, name, pa.array(values))
    images = [f"png {name}".encode() if kind == "image" else None for kind, name in zip(kinds, names, strict=True)]
    return table.set_column(table.schema.get_field_index("image"), "image", pa.array(images, pa.binary()))
