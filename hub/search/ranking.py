"""One ranking of images and texts: scores made comparable between the two kinds."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from bifocal.embedding.items import KINDS

_SAMPLE_SIZE = 1024
_MIN_SAMPLE_SIZE = 8  # the mean and deviation of fewer scores mean nothing


class Calibration:
    """Samples of both kinds, which show how high a query scores with each kind in general.

    Texts are more similar to texts than to the images that they describe (the modality gap, arXiv 2203.02053). In one
    ranking, a score therefore counts by its distance from the mean score of its kind, in standard deviations.

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
        usual = self.samples[kind] @ query
        return (scores - usual.mean()) / max(float(usual.std()), 1e-6)


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
            samples[kind] = np.sort(generator.choice(rows, min(_SAMPLE_SIZE, len(rows)), replace=False))
    return samples
