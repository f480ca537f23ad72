"""What a `Searcher` needs of the collection that it searches."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from bifocal.hub.search.hits import Hit
from bifocal.hub.search.settings import Variant


class Ranked(Protocol):
    """What several queries found."""

    def hits(self, query: int, text: str = "") -> list[Hit]:
        """Return the hits of a query, by its number, with their texts and thumbnails.

        Args:
            query: number of the query.
            text: text of the query, for collections that also search for its words.
        """
        ...


class Searchable(Protocol):
    """A collection of images and texts: a `SearchIndex` in a folder, or a `LanceIndex` in a database.

    Args:
        model: folder or Hub id of the model that its vectors come from.
        weights: hash of the model's weights.
        dimensions: length of its vectors.
        dtype: dtype that the vectors were computed in.
        prompts: text that goes before queries, as "query".
        fast_decoding: whether its images were decoded at reduced scale.
        variants: forms of its vectors that can be searched.
    """

    model: str
    weights: str
    dimensions: int
    dtype: str
    prompts: dict[str, str]
    fast_decoding: bool
    variants: list[Variant]

    def counts(self) -> Mapping[str, int]:
        """Return the number of images, captions and texts."""
        ...

    def choose_variant(
        self, dim: int | None = None, precision: str | None = None, approximate: bool = False
    ) -> Variant:
        """Return the most exact form of its vectors, of what is chosen; SearchError if there is none."""
        ...

    def require_variant(self, dim: int, precision: str, approximate: bool = False) -> Variant:
        """Return a form of its vectors, or raise SearchError if it has no such form."""
        ...

    def describe(self, variant: Variant | None = None) -> str:
        """Return what those who search should know; empty if there is nothing."""
        ...

    def require_same_weights(self, weights: str, model: str) -> None:
        """Raise SearchError if its vectors come from other weights."""
        ...

    def rank(self, vectors: np.ndarray, k: int, kinds: Sequence[str], variant: Variant) -> Ranked:
        """Return what is nearest to the vectors (queries, dimensions) of several queries."""
        ...
