"""What a search returns, and errors of indexes and searches."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bifocal.embedding.items import KINDS
from bifocal.errors import BifocalError


class SearchError(BifocalError):
    """What is wrong with an index or a search."""


class QueryError(SearchError):
    """What is wrong with a query. Unlike other errors, it may be shown to a visitor."""


@dataclass
class Hit:
    """A result of a search.

    Args:
        name: first name of the content.
        kind: "image" or "text".
        text: the text itself, or the captions of an image.
        score: cosine similarity to the query: of the image itself or of the caption that matched.
        ranking_score: what hits are ranked by: the score, or in one ranking of both kinds its distance from the mean
            score of the kind, in standard deviations. For a caption in a ranking of images only, the score of an image
            that is as far from the mean.
        thumbnail: bytes of a PNG or JPEG; None for a text.
        names: all names of the content.
        caption: the caption by which an image was found; None if the image itself matched best, and for a text.
    """

    name: str
    kind: str
    text: str
    score: float
    ranking_score: float
    thumbnail: bytes | None = None
    names: tuple[str, ...] = ()
    caption: str | None = None

    @property
    def matched(self) -> str:
        """What matched best: "image", "caption" or "text"."""
        return self.kind if self.caption is None else "caption"

    @property
    def other_names(self) -> tuple[str, ...]:
        return tuple(name for name in self.names if name != self.name)

    def to_dict(self) -> dict[str, Any]:
        """Return the hit as plain JSON values, without the thumbnail."""
        return {
            "name": self.name, "names": [self.name, *self.other_names], "kind": self.kind, "text": self.text,
            "score": self.score, "ranking_score": self.ranking_score, "matched": self.matched, "caption": self.caption,
        }  # fmt: skip


def check_kinds(kinds: Sequence[str]) -> tuple[str, ...]:
    """Return the kinds to search for.

    Raises:
        SearchError: if there are none, or one is unknown.
    """
    unknown = next((kind for kind in kinds if kind not in KINDS), None)
    if unknown is not None or not kinds:
        raise SearchError(f"'{unknown}' cannot be searched for. Choose one of {', '.join(KINDS)}.")
    return tuple(kinds)


def require_finite(vectors: np.ndarray) -> None:
    """Check the vectors (..., dimensions) of queries: nothing is near to one that has no length.

    Raises:
        SearchError: if a number or a length is not finite.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        lengths = np.linalg.norm(vectors, axis=-1)
    if not np.isfinite(lengths).all():
        raise SearchError("The vector of a query is not finite. The model's weights or dtype may be broken.")
