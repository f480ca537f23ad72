"""One ranking of images and texts: scores made comparable between the two kinds, and rows merged into things."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from bifocal.embedding.items import KINDS

SAMPLE_SIZE = 1024  # of each kind
_MIN_SAMPLE_SIZE = 8  # the mean and deviation of fewer scores mean nothing
_HIGHEST = 0.999  # of a caption among images: an image that is the query itself comes first


class Calibration:
    """Samples of both kinds, which show how high a query scores with each kind in general.

    Texts are more similar to texts than to the images that they describe (the modality gap, arXiv 2203.02053). In one
    ranking, a score therefore counts by its distance from the mean score of its kind, in standard deviations. In a
    ranking of images only, the score of a caption counts as the score of an image that is as far from the mean.

    Args:
        samples: unit vectors (items, dimensions) by kind. If a kind has none, scores count as they are.
    """

    def __init__(self, samples: Mapping[str, np.ndarray]) -> None:
        self.samples = samples

    def ranking_scores(self, scores: np.ndarray, kind: str, query: np.ndarray) -> np.ndarray:
        """Return the numbers by which items of a kind are ranked among items of both kinds.

        Args:
            scores: cosine similarities (items,) to the query.
            query: unit vector (dimensions,).
        """
        if any(kind not in self.samples for kind in KINDS):
            return scores
        mean, deviation = self._usual(kind, query)
        return (scores - mean) / deviation

    def image_scores(self, scores: np.ndarray, query: np.ndarray) -> np.ndarray:
        """Return the scores of captions (items,) as scores of images; see `ranking_scores`."""
        if any(kind not in self.samples for kind in KINDS):
            return scores
        mean, deviation = self._usual("image", query)
        return np.minimum(mean + deviation * self.ranking_scores(scores, "text", query), _HIGHEST)

    def _usual(self, kind: str, query: np.ndarray) -> tuple[float, float]:
        """Return mean and standard deviation of the scores of a kind."""
        scores = self.samples[kind] @ query
        return float(scores.mean()), max(float(scores.std()), 1e-6)


class Match(NamedTuple):
    """A thing that a query found: an image with its captions, or a text.

    Args:
        thing: row of the image or text, or its key.
        row: row by which it was found, or its key: the thing itself or, of an image, a caption.
        ranking_score: what the row is ranked by.
        score: cosine similarity of the row to the query.
    """

    thing: Any
    row: Any
    ranking_score: float
    score: float


def best_things(
    rows: Iterable[tuple[float, float, Any]], things_of: Callable[[Any], Sequence[Any]], k: int,
    bound: float = float("-inf"),
) -> list[Match] | None:  # fmt: skip
    """Return the k best things, each once by its best row; None if more rows are needed to be certain.

    Args:
        rows: ranking score, score and row (or key) of the rows that a search found, in any order.
        things_of: from a row to the things that it stands for, in the order in which they share its score: an image
            stands for itself, a caption for its images, a text for itself.
        k: number of things.
        bound: ranking score that no other row exceeds; minus infinity if there are no others.
    """
    best: dict[Any, Match] = {}
    for ranking_score, score, row in sorted(rows, key=lambda row: (-row[0], -row[1], row[2])):
        if len(best) >= k or ranking_score < bound:
            break
        for thing in things_of(row):
            best.setdefault(thing, Match(thing, row, ranking_score, score))
    if len(best) < k and bound > float("-inf"):
        return None
    return list(best.values())[:k]


def sample_rows(kinds: np.ndarray) -> dict[str, np.ndarray]:
    """Return the rows of the sample of each kind, in order; a kind with too few items for a sample is omitted.

    Args:
        kinds: kind of each row of a table.
    """
    generator = np.random.default_rng(0)
    samples: dict[str, Any] = {}
    for kind in KINDS:
        rows = np.flatnonzero(kinds == kind)
        if len(rows) >= _MIN_SAMPLE_SIZE:
            samples[kind] = np.sort(generator.choice(rows, min(SAMPLE_SIZE, len(rows)), replace=False))
    return samples
