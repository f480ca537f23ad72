"""Vectors of texts and images for mining, by the rows that they are in."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from bifocal.data.vector_cache import BATCHES_AT_ONCE, VectorCache, slices
from bifocal.embedding.embed import EmbedSettings, embed_items
from bifocal.embedding.items import Item
from bifocal.embedding.models import EmbeddingModel
from bifocal.modeling import load_image
from bifocal.training.mining_settings import MiningError

_ROWS_IN_MEMORY = 256  # with the bytes of their images


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
    name: str, identity: Iterable[str], count: int, items_of: Callable[[slice], list[Item | None]],
    model: EmbeddingModel, settings: EmbedSettings, cache: VectorCache,
) -> np.ndarray:  # fmt: skip
    """Return the vectors (rows, dimensions) of rows, NaN where there is none; those in the cache are reused.

    Args:
        name: "captions" or "images".
        identity: all that decides the vectors; see `VectorCache.vectors`.
        count: number of rows.
        items_of: returns the items of some rows; None for a row without one.

    Raises:
        MiningError: if no row can be embedded.
        DataError: if another run is writing the same vectors, or their file is damaged.
    """

    def embed(rows: slice) -> dict[int, np.ndarray]:
        vectors: dict[int, np.ndarray] = {}
        for part in slices(rows.stop, max(_ROWS_IN_MEMORY, settings.batch_size), rows.start):
            items = {row: item for row, item in enumerate(items_of(part), part.start) if item is not None}
            results = zip(items, embed_items(list(items.values()), model, settings), strict=True)
            vectors |= {row: result.vector for row, result in results if result.vector is not None}
        return vectors

    vectors = cache.vectors(name, identity, count, embed, BATCHES_AT_ONCE * settings.batch_size)
    if not vectors.shape[1]:
        raise MiningError(f"None of the {name} of {count:,} rows can be embedded. Check the columns and files.")
    return vectors
