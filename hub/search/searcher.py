"""A model and an index together: search by text, by image, or by both."""

import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from bifocal.hub.search.index import SearchIndex
from bifocal.hub.search.items import KINDS, Hit, Item, SearchError, normalize, read_image
from bifocal.hub.search.models import EmbeddingModel, load_model, weights_hash
from bifocal.hub.search.sync import AddResult, ItemSource
from bifocal.modeling.dtype_bifocal import default_device, is_fast

MAX_QUERY_LENGTH = 20_000  # characters; tokenizing a book takes minutes


class Searcher:
    """An index with the model that it was made with.

    Args:
        index: to search.
        model: a folder or Hub id, or the loaded model; the one that the index was made with if None.
        dtype: dtype that queries are embedded in, one of `DTYPE_CHOICES`. When None or "auto", that of the index; but
            float32 where the device does not multiply in it: cosines differ by less than 0.0005, and it is faster.

    Raises:
        SearchError: if the model cannot be loaded, or has other weights than the index.
    """

    def __init__(self, index: SearchIndex, model: str | EmbeddingModel | None = None, dtype: str | None = None) -> None:
        self.index = index
        if not isinstance(model, EmbeddingModel):
            if dtype in (None, "auto"):
                dtype = index.dtype if is_fast(index.dtype, default_device()) else "float32"
            model = load_model(index.model if model is None else os.path.expanduser(model), dtype)
        self.model = model
        index.require_same_weights(weights_hash(model.name), model.name)

    def vector(self, text: str | None = None, image: Any = None, weight: float = 0.5) -> np.ndarray:
        """Return the unit vector of a query.

        Args:
            text: a query of any length; the model sees its beginning.
            image: anything that `load_image` reads, up to 64 million pixels.
            weight: weight of the text if there are both, from 0 to 1.

        Raises:
            SearchError: if there is neither, the image cannot be read, or the model embeds no images.
        """
        text = (text or "").strip()[:MAX_QUERY_LENGTH]
        if not text and image is None:
            raise SearchError("Enter a text, an image or both.")
        weighted: list[np.ndarray] = []
        if image is not None:
            self.model.require_images()
            try:
                decoded = read_image(image)
            except SearchError as error:
                raise SearchError(f"The image cannot be used: {error}. Choose another one.") from error
            weighted.append((1.0 - weight if text else 1.0) * normalize(self.model.encode_image([decoded])[0]))
        if text:
            vector = self.model.encode_text([text], "query", self.index.prompts.get("query", ""))[0]
            weighted.append((weight if image is not None else 1.0) * normalize(vector))
        return normalize(np.sum(weighted, axis=0))

    def search(
        self, text: str | None = None, image: Any = None, k: int = 10, kinds: Sequence[str] = KINDS,
        weight: float = 0.5, variant: tuple[int, str] | None = None,
    ) -> list[Hit]:  # fmt: skip
        """Return the k items nearest to a text, an image or both; see `vector` and `SearchIndex.search`."""
        return self.index.search(self.vector(text, image, weight), k, kinds, variant)

    def add(
        self, items: Iterable[Item], batch_size: int = 32, progress: Callable[[int], None] = lambda count: None,
        source: ItemSource | None = None, prune: bool = False,
    ) -> AddResult:  # fmt: skip
        """Embed and add items; see `SearchIndex.add`.

        Args:
            batch_size: texts or images per forward pass.

        Raises:
            SearchError: if the model was loaded in another dtype than the index was made in.
        """
        self.index.require_same_dtype(self.model.dtype)
        return self.index.add(
            items,
            lambda texts: self.model.encode_text(texts, "document", self.index.prompts.get("document", ""), batch_size),
            lambda images: self.model.encode_image(images, batch_size),
            progress,
            source,
            prune,
        )
