"""A model and an index together: search by text, by image, or by both, for any number of threads at once."""

import os
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from bifocal.embedding.embed import EmbedSettings, embed_items
from bifocal.embedding.items import KINDS, Item, ItemError, decode_item, normalize
from bifocal.embedding.models import EmbeddingModel, load_model, weights_hash
from bifocal.hub.search.batching import Batcher
from bifocal.hub.search.hits import Hit, QueryError
from bifocal.hub.search.index import SearchIndex
from bifocal.hub.search.settings import Variant
from bifocal.hub.search.snapshot import Rankings
from bifocal.hub.search.sync import AddResult, ItemSource
from bifocal.modeling.dtype_bifocal import default_device, is_fast
from bifocal.modeling.image_batches_bifocal import PreparedImage

MAX_QUERY_LENGTH = 20_000  # characters; tokenizing a book takes minutes
_DECODED_AT_ONCE = 4  # images of queries: a large one takes hundreds of megabytes until it is resized
_BATCH_SIZE = 64
_BATCH_TOKENS = 2048  # per batch of several queries: those who wait for it should not wait long
_LONG_TEXT = 128  # tokens; queries with longer texts wait for each other, and no others for them
_BYTES_PER_TOKEN = 4  # of UTF-8, about
_IMAGE_TOKENS = 256  # about as many as patches of an image


@dataclass(frozen=True)
class _Ranking:
    """A ranking that a query asks for; see `SearchIndex.search`."""

    k: int
    kinds: tuple[str, ...]
    variant: Variant


@dataclass
class _Query:
    """A query that is ready to be embedded.

    Args:
        text: empty for none.
        image: decoded and prepared for the model; None for none.
        weight: weight of the text if there are both.
        rankings: what to search for with its vector.
    """

    text: str
    image: PreparedImage | Image.Image | None
    weight: float
    rankings: tuple[_Ranking, ...] = ()

    @property
    def text_tokens(self) -> int:
        """About the number of tokens of the text."""
        return 1 + len(self.text.encode()) // _BYTES_PER_TOKEN if self.text else 0

    @property
    def tokens(self) -> int:
        """About the number of tokens to embed."""
        return self.text_tokens + (_IMAGE_TOKENS if self.image is not None else 0)


class Searcher:
    """An index with the model that it was made with, for any number of threads.

    Queries of threads that wait at the same time are embedded and searched together (see `Batcher`): each gets what it
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
        index: SearchIndex,
        model: str | EmbeddingModel | None = None,
        batch_size: int = _BATCH_SIZE,
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
        batching = _Batching(index, model)
        self._decoding = threading.Semaphore(_DECODED_AT_ONCE)
        self._short, self._long = (
            Batcher(batching.answer, lambda query: query.tokens, batch_size, _BATCH_TOKENS) for _ in range(2)
        )

    def vector(self, text: str | None = None, image: Any = None, weight: float = 0.5) -> np.ndarray:
        """Return the unit vector of a query.

        Args:
            text: a query of any length; the model sees its beginning.
            image: anything that `load_image` reads, up to 64 million pixels.
            weight: weight of the text if there are both, from 0 to 1.

        Raises:
            QueryError: if there is neither, the image cannot be read, or the model embeds no images.
        """
        return self._answer(self._query(text, image, weight)).vector

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
        query = self._query(text, image, weight)
        chosen = self.variant if variant is None else Variant(*variant)
        query.rankings = tuple(_Ranking(k, tuple(kinds), chosen) for kinds in rankings)
        # Texts and thumbnails of hits are read by the thread of the query.
        return [found.hits(number) for found, number in self._answer(query).rankings]

    def _query(self, text: str | None, image: Any, weight: float) -> _Query:
        text = (text or "").strip()[:MAX_QUERY_LENGTH]
        if not text and image is None:
            raise QueryError("Enter a text, an image or both.")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise QueryError("The text is not valid Unicode: it holds half a character. Enter it again.") from error
        prepared = None
        if image is not None:
            if not self.model.embeds_images:
                raise QueryError(f"'{self.model.name}' embeds no images; use texts only, or a model that embeds both.")
            try:
                preparer = self.model.image_preparer(self.index.fast_decoding)
                with self._decoding:
                    prepared = preparer.prepare(decode_item(image, preparer))
            except ItemError as error:
                raise QueryError(f"The image cannot be used: {error}. Choose another one.") from error
        return _Query(text, prepared, weight)

    def _answer(self, query: _Query) -> "_Answer":
        return (self._long if query.text_tokens > _LONG_TEXT else self._short)(query)

    def add(
        self, items: Iterable[Item], batch_size: int = 32, progress: Callable[[int], None] = lambda count: None,
        source: ItemSource | None = None, prune: bool = False, num_workers: int | None = None,
    ) -> AddResult:  # fmt: skip
        """Embed and add items; see `SearchIndex.add`.

        Args:
            batch_size: texts or images per forward pass.
            num_workers: threads that decode and resize images ahead of the model; see `encode_image` of a model.

        Raises:
            SearchError: if the model was loaded in another dtype than the index was made in.
        """
        self.index.require_same_dtype(self.model.dtype)
        prompt, fast = self.index.prompts.get("document", ""), self.index.fast_decoding
        settings = EmbedSettings("document", prompt, batch_size, num_workers, fast)
        return self.index.add(items, lambda part: embed_items(part, self.model, settings), progress, source, prune)


@dataclass
class _Answer:
    """What a query gets.

    Args:
        vector: (dimensions,) of length 1.
        rankings: for each ranking, those of a group of queries, and the number of this query in it.
    """

    vector: np.ndarray
    rankings: list[tuple[Rankings, int]]


@dataclass
class _Batching:
    """What embeds and searches queries together."""

    index: SearchIndex
    model: EmbeddingModel

    def answer(self, queries: Sequence[_Query]) -> list[_Answer]:
        """Return the answers to queries: texts and images are embedded in one call each, then searched for together."""
        vectors = self.vectors(queries)
        answers = [_Answer(vector, []) for vector in vectors]
        groups: dict[_Ranking, list[int]] = defaultdict(list)
        for number, query in enumerate(queries):
            for ranking in dict.fromkeys(query.rankings):
                groups[ranking].append(number)
        found: dict[tuple[_Ranking, int], tuple[Rankings, int]] = {}
        for ranking, numbers in groups.items():
            rankings = self.index.rank(vectors[numbers], ranking.k, ranking.kinds, ranking.variant)
            found |= {(ranking, number): (rankings, row) for row, number in enumerate(numbers)}
        for number, (query, answer) in enumerate(zip(queries, answers, strict=True)):
            answer.rankings = [found[ranking, number] for ranking in query.rankings]
        return answers

    def vectors(self, queries: Sequence[_Query]) -> np.ndarray:
        """Return the unit vectors (queries, dimensions) of queries."""
        texts = [query.text for query in queries if query.text]
        images = [query.image for query in queries if query.image is not None]
        prompt = self.index.prompts.get("query", "")
        of_images = iter(normalize(self.model.encode_image(images, len(images)))) if images else iter(())
        of_texts = iter(normalize(self.model.encode_text(texts, "query", prompt, len(texts)))) if texts else iter(())
        vectors = []
        for query in queries:
            has_both = query.text and query.image is not None
            weighted = []
            if query.image is not None:
                weighted.append((1.0 - query.weight if has_both else 1.0) * next(of_images))
            if query.text:
                weighted.append((query.weight if has_both else 1.0) * next(of_texts))
            vectors.append(normalize(np.sum(weighted, axis=0)))
        return np.stack(vectors)
