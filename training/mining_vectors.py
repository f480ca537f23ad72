"""Vectors of texts and images for mining, written to files batch by batch."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from bifocal.embedding.embed import EmbedSettings, embed_items
from bifocal.embedding.items import Item
from bifocal.embedding.models import EmbeddingModel
from bifocal.files import write_json
from bifocal.modeling import load_image
from bifocal.training.mining_settings import MiningError

_ROWS_IN_MEMORY = 256  # with the bytes of their images
_BATCHES_SAVED = 16  # batches that are written at once: a killed run loses at most as many


def image_item(value: Any) -> Item | None:
    """Return the image of a row, the first of several, as an item; None if it cannot be read."""
    image = first_image(value)
    try:
        return Item("", image=image if isinstance(image, str | bytes) else load_image(image))
    except (OSError, ValueError):
        return None


def first_image(value: Any) -> Any:
    """Return the image of a row, the first of several, as bytes or path if it is undecoded."""
    chosen = value[0] if isinstance(value, list) and value else value
    if isinstance(chosen, dict):
        return chosen["bytes"] if chosen["bytes"] is not None else chosen["path"]
    return chosen


def embedded_rows(
    count: int, items_of: Callable[[slice], list[Item | None]], model: EmbeddingModel, settings: EmbedSettings,
    path: Path,
) -> np.ndarray:  # fmt: skip
    """Write the vectors of rows into a file and return it as an array (rows, dimensions), NaN where there is none.

    Embeddings that a killed run left there are kept.

    Args:
        count: number of rows.
        items_of: returns the items of some rows; None for a row without one.
        path: of the file, without suffix.

    Raises:
        MiningError: if the files there are not those of a mining run.
    """
    file, progress = path.with_suffix(".npy"), path.with_suffix(".json")
    done = _progress(file, progress)
    vectors = np.load(file, mmap_mode="r+") if done else None
    for batch in slices(count, _BATCHES_SAVED * settings.batch_size, done):
        embedded: dict[int, np.ndarray] = {}
        for part in slices(batch.stop, max(_ROWS_IN_MEMORY, settings.batch_size), batch.start):
            items = {row: item for row, item in enumerate(items_of(part), part.start) if item is not None}
            results = zip(items, embed_items(list(items.values()), model, settings), strict=True)
            embedded |= {row: result.vector for row, result in results if result.vector is not None}
        if embedded and vectors is None:
            length = len(next(iter(embedded.values())))
            vectors = np.lib.format.open_memmap(file, "w+", np.float32, (count, length))
            vectors[:] = np.nan
        if vectors is None:
            raise MiningError(f"None of the first {batch.stop} rows can be embedded; look at their images and texts.")
        if embedded:
            vectors[list(embedded)] = list(embedded.values())
        vectors.flush()
        write_json(progress, {"done": batch.stop})
    assert vectors is not None
    return vectors


def _progress(file: Path, progress: Path) -> int:
    """Return how many embeddings of a file are complete; start its progress file, which marks it as ours."""
    try:
        state = json.loads(progress.read_text(encoding="utf-8")) if progress.exists() else None
    except ValueError:
        state = {}
    ours = isinstance(state, dict) and set(state) == {"done"}
    if (state is not None and not ours) or (state is None and file.exists()):
        raise MiningError(
            f"'{progress if state is not None else file}' is not a file of a mining run, and would be overwritten. "
            "Choose another cache folder."
        )
    if state is None:
        write_json(progress, {"done": 0})
    return state["done"] if state and file.exists() else 0


def slices(count: int, size: int, start: int = 0) -> Iterator[slice]:
    """Yield the slices of `size` rows, from row `start` to row `count`."""
    for first in range(start, count, size):
        yield slice(first, min(first + size, count))
