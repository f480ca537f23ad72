"""Items in, vectors out: the one loop over batches of every command that embeds many."""

from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from bifocal.embedding.items import MAX_PIXELS, THUMBNAIL_SIZE, Item, ItemError, decode_item, normalize, thumbnail
from bifocal.embedding.models import EmbeddingModel
from bifocal.modeling.image_batches_bifocal import ImagePreparer


@dataclass(frozen=True)
class EmbedSettings:
    """How items are embedded.

    Args:
        role: "query" or "document": which of the model's ways of embedding texts is used.
        prompt: text that goes before each text; None for the model's own prompt of this role.
        batch_size: texts or images per forward pass.
        num_workers: threads that decode and resize images ahead of the model; see `BifocalModel.encode_image`.
        fast_decoding: whether large JPEGs are decoded at reduced scale; see `BifocalModel.encode_image`.
        thumbnails: whether thumbnails of images are made.
        smallest_side: length that the shorter side of an image keeps in fast decoding.
        max_pixels: largest image that is decoded; None for Pillow's own limit.
    """

    role: str = "document"
    prompt: str | None = ""
    batch_size: int = 32
    num_workers: int | None = None
    fast_decoding: bool = False
    thumbnails: bool = True
    smallest_side: int = THUMBNAIL_SIZE
    max_pixels: int | None = MAX_PIXELS


@dataclass
class EmbeddedItem:
    """An item with its vector.

    Args:
        item: the item.
        vector: (dimensions,) of length 1 in float32; None if the item cannot be embedded.
        thumbnail: bytes of a small PNG or JPEG of an image; None for a text, or if none was asked for.
        error: why the item cannot be embedded; empty if it was.
    """

    item: Item
    vector: np.ndarray | None
    thumbnail: bytes | None = None
    error: str = ""


def embed_items(items: Sequence[Item], model: EmbeddingModel, settings: EmbedSettings) -> list[EmbeddedItem]:
    """Return the items with their vectors, in order. An item that cannot be read has an error and no vector.

    All texts are embedded in one call and all images in another, so give hundreds of items at once: batches are filled,
    and images are decoded ahead of the model.

    Args:
        items: images and texts, as many as fit into memory as thumbnails and vectors.

    Raises:
        ModelError: if there are images, and the model embeds none.
    """
    texts = [item.text for item in items if item.image is None]
    text_vectors = iter(model.encode_text(texts, settings.role, settings.prompt, settings.batch_size) if texts else ())
    image_results = _embed_images([item.image for item in items if item.image is not None], model, settings)
    embedded = []
    with closing(image_results):
        for item in items:
            if item.image is None:
                embedded.append(_checked(item, next(text_vectors)))
                continue
            note, vector = next(image_results)
            if isinstance(note, ItemError):
                embedded.append(EmbeddedItem(item, None, error=str(note)))
            else:
                embedded.append(_checked(item, vector, note))
    return embedded


def _checked(item: Item, vector: Any, small: bytes | None = None) -> EmbeddedItem:
    unit = normalize(np.asarray(vector, np.float32))
    if not np.isfinite(unit).all():
        return EmbeddedItem(item, None, error="its embedding is not finite")
    return EmbeddedItem(item, unit, small)


def _embed_images(
    sources: Sequence[Any], model: EmbeddingModel, settings: EmbedSettings
) -> Generator[tuple[Any, Any], None, None]:
    """Yield a thumbnail, or an error, and a vector for each image."""
    if not sources:
        return
    read = partial(_read, settings=settings)
    ahead = model.embed_ahead(sources, read, settings.batch_size, settings.num_workers, settings.fast_decoding)
    with closing(ahead) as images:
        yield from images


def _read(preparer: ImagePreparer, source: Any, settings: EmbedSettings) -> tuple[bytes | ItemError | None, Any]:
    """Return an image's thumbnail and what is embedded of it; an error and None if it cannot be read."""
    try:
        decoded = decode_item(source, preparer, settings.smallest_side, settings.max_pixels)
    except ItemError as error:
        return error, None
    return thumbnail(decoded.image) if settings.thumbnails else None, preparer.prepare(decoded)
