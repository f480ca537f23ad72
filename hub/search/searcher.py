"""A model and an index together: search by text, by image, or by both, for any number of threads at once."""

import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bifocal.embedding.embed import EmbedSettings, embed_items
from bifocal.embedding.items import KINDS, Item, normalize
from bifocal.embedding.models import EmbeddingModel, load_model, weights_hash
from bifocal.hub.search.batching import Batcher
from bifocal.hub.search.encoder import BATCH_SIZE, Encoder, Piece, about_tokens
from bifocal.hub.search.hits import Hit, QueryError, SearchError, require_finite
from bifocal.hub.search.index import SearchIndex
from bifocal.hub.search.searchable import Ranked, Searchable
from bifocal.hub.search.settings import Variant
from bifocal.hub.search.sync import AddResult, ItemSource
from bifocal.modeling.dtype_bifocal import default_device, is_fast

MAX_QUERY_LENGTH = 20_000  # characters; tokenizing a book takes minutes


@dataclass(frozen=True)
class _Ranking:
    """A ranking that a query asks for; see `SearchIndex.search`."""

    k: int
    kinds: tuple[str, ...]
    variant: Variant


@dataclass(frozen=True)
class _Search:
    """A vector to search with.

    Args:
        vector: (dimensions,) of length 1.
        rankings: what to search for.
    """

    vector: np.ndarray
    rankings: tuple[_Ranking, ...]


class Searcher:
    """An index with the model that it was made with, for any number of threads.

    Queries of threads that wait at the same time are embedded and searched together (see `Encoder`): each gets what it
    would get alone, to float32's precision. Images are decoded and resized in the thread of their query.

    Args:
        index: to search.
        model: a folder or Hub id, or the loaded model; the one that the index was made with if None.
        batch_size: most queries that are embedded together; with 1, each thread embeds its own.
        variant: variant to search by where a search names none; the index's most exact one if None.
        dtype: dtype that queries are embedded in, one of `DTYPE_CHOICES`. When None or "auto", that of the index; but
            float32 where the device does not multiply in it, which is faster and nearly the same.

    Raises:
        SearchError: if the model cannot be loaded, or has other weights than the index.
    """

    def __init__(
        self,
        index: Searchable,
        model: str | EmbeddingModel | None = None,
        batch_size: int = BATCH_SIZE,
        dtype: str | None = None,
        variant: Sequence[Any] | None = None,
    ) -> None:
        self.index = index
        self.variant = index.choose_variant() if variant is None else index.require_variant(*variant)
        if not isinstance(model, EmbeddingModel):
            if dtype in (None, "auto"):
                dtype = index.dtype if is_fast(index.dtype, default_device()) else "float32"
            model = load_model(index.model if model is None else os.path.expanduser(model), dtype)
        self.model = model
        index.require_same_weights(weights_hash(model.name), model.name)
        self.encoder = Encoder(model, batch_size, index.fast_decoding)
        self._searches = Batcher(self._rank, max_items=batch_size)

    def vector(self, text: str | None = None, image: Any = None, weight: float = 0.5) -> np.ndarray:
        """Return the unit vector of a query.

        Args:
            text: a query of any length; the model sees its beginning.
            image: anything that `load_image` reads, up to 64 million pixels.
            weight: weight of the text if there are both, from 0 to 1.

        Raises:
            QueryError: if there is neither, the image cannot be read, or the model embeds no images.
            SearchError: if the vector is not finite.
        """
        text = (text or "").strip()[:MAX_QUERY_LENGTH]
        if not text and image is None:
            raise QueryError("Enter a text, an image or both.")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise QueryError("The text is not valid Unicode: it holds half a character. Enter it again.") from error
        texts = (text,) if text else ()
        prompt = self.index.prompts.get("query", "")
        sources = () if image is None else (image,)
        with self.encoder.room_for(sources):
            images = tuple(map(self.encoder.prepare, sources))
            of_texts, of_images = self.encoder.embed(Piece(texts, images, "query", prompt, about_tokens(text)))
        if texts and images:
            vector = normalize(weight * of_texts[0] + (1.0 - weight) * of_images[0])
        else:
            vector = of_texts[0] if texts else of_images[0]
        require_finite(vector)  # here, not in a batch with those of others
        return vector

    def search(
        self, text: str | None = None, image: Any = None, k: int = 10, kinds: Sequence[str] = KINDS,
        weight: float = 0.5, variant: Sequence[Any] | None = None,
    ) -> list[Hit]:  # fmt: skip
        """Return the k items nearest to a text, an image or both; see `vector` and `SearchIndex.search`."""
        return self.search_rankings([kinds], text, image, k, weight, variant)[0]

    def search_rankings(
        self, rankings: Sequence[Sequence[str]], text: str | None = None, image: Any = None, k: int = 10,
        weight: float = 0.5, variant: Sequence[Any] | None = None,
    ) -> list[list[Hit]]:  # fmt: skip
        """Return several rankings of one query, each of some kinds; see `search`."""
        chosen = self.variant if variant is None else Variant(*variant)
        asked = tuple(_Ranking(k, tuple(kinds), chosen) for kinds in rankings)
        search = _Search(self.vector(text, image, weight), asked)
        # Texts and thumbnails of hits are read by the thread of the query.
        words = (text or "").strip()[:MAX_QUERY_LENGTH]
        return [found.hits(number, words) for found, number in self._searches(search)]

    def _rank(self, searches: Sequence[_Search]) -> list[list[tuple[Ranked, int]]]:
        """Return, for each search and ranking, the rankings of a group of searches and the number of this one in it."""
        groups: dict[_Ranking, list[int]] = defaultdict(list)
        for number, search in enumerate(searches):
            for ranking in dict.fromkeys(search.rankings):
                groups[ranking].append(number)
        ranked: dict[tuple[_Ranking, int], tuple[Ranked, int]] = {}
        for ranking, numbers in groups.items():
            vectors = np.stack([searches[number].vector for number in numbers])
            rankings = self.index.rank(vectors, ranking.k, ranking.kinds, ranking.variant)
            ranked |= {(ranking, number): (rankings, row) for row, number in enumerate(numbers)}
        return [[ranked[ranking, number] for ranking in search.rankings] for number, search in enumerate(searches)]

    def add(
        self, items: Iterable[Item], batch_size: int = 32, progress: Callable[[int], None] = lambda count: None,
        source: ItemSource | None = None, prune: bool = False, num_workers: int | None = None,
    ) -> AddResult:  # fmt: skip
        """Embed and add items; see `SearchIndex.add`.

        Args:
            batch_size: texts or images per forward pass.
            num_workers: threads that decode and resize images ahead of the model; see `encode_image` of a model.

        Raises:
            SearchError: if the model was loaded in another dtype than the index was made in, or it is a database.
        """
        if not isinstance(self.index, SearchIndex):
            raise SearchError("A database is written by bifocal embed --database, not through a search.")
        self.index.require_same_dtype(self.model.dtype)
        prompt, fast = self.index.prompts.get("document", ""), self.index.fast_decoding
        settings = EmbedSettings("document", prompt, batch_size, num_workers, fast)
        return self.index.add(items, lambda part: embed_items(part, self.model, settings), progress, source, prune)
