"""The modality gap (arXiv 2203.02053): texts and pictures lie apart, and an index of both suffers from it."""

from dataclasses import dataclass

import numpy as np

from bifocal.errors import EvaluationError

_KINDS = ("image-image", "text-text", "image-text")
_BLOCK = 2000  # queries at a time
_SHOWN = 400  # items whose similarities the histograms show


@dataclass
class Gap:
    """
    Args:
        metrics: `centroid_distance`, the length of the difference of the two means; `matching_cosine`, the mean of
            pictures and their texts, and `image_text_cosine`, `image_image_cosine`, `text_text_cosine` of those that do
            not match; `mixed/text_wrong_kind` and `mixed/image_wrong_kind`, how often the first hit in an index of
            texts and pictures is of the query's own kind, though the right one is of the other; `.../calibrated` the
            same with calibration.
        similarities: samples by pair of kinds, for histograms.
    """

    metrics: dict[str, float]
    similarities: dict[str, np.ndarray]


def modality_gap(images: np.ndarray, texts: np.ndarray) -> Gap:
    """Measure the gap on pictures and their texts.

    The mixed index holds all pictures and all texts but the query itself; the one right item is the query's partner of
    the other kind. Calibration subtracts from each similarity the mean of non-matching pairs of its two kinds and
    divides by their deviation, so that kinds compete on equal terms; it is fitted on the even items and measured on the
    odd ones, which are the only queries.

    Args:
        images, texts: (N, D) unit vectors, row i of both belonging together.

    Raises:
        EvaluationError: numbers that differ, or fewer than four pairs.
    """
    if images.shape != texts.shape or len(images) < 4:
        raise EvaluationError(f"{len(images)} pictures and {len(texts)} texts are no four pairs or more.")
    pairs = {"image-image": (images, images), "text-text": (texts, texts), "image-text": (images, texts)}
    means, deviations, similarities = {}, {}, {}
    fit = slice(0, None, 2)
    for kind, (left, right) in pairs.items():
        values = _off_diagonal(left[fit] @ right[fit].T)
        means[kind], deviations[kind] = float(values.mean()), float(values.std()) or 1.0
        shown = _off_diagonal(left[:_SHOWN] @ right[:_SHOWN].T)
        similarities[kind] = shown[:: max(1, len(shown) // 20_000)]
    similarities["matching"] = (images * texts).sum(axis=1)
    metrics = {
        "centroid_distance": float(np.linalg.norm(images.mean(0) - texts.mean(0))),
        "matching_cosine": float(similarities["matching"].mean()),
        **{f"{kind.replace('-', '_')}_cosine": means[kind] for kind in _KINDS},
    }
    for name, queries, others in (("text", texts, images), ("image", images, texts)):
        own = f"{name}-{name}"
        for suffix, calibrated in (("", False), ("/calibrated", True)):
            wrong = _wrong_kind(queries, others, means, deviations, own) if calibrated else _wrong_kind(queries, others)
            metrics[f"mixed/{name}_wrong_kind{suffix}"] = wrong
    return Gap(metrics, similarities)


def _wrong_kind(
    queries: np.ndarray, others: np.ndarray, means: dict[str, float] | None = None,
    deviations: dict[str, float] | None = None, own: str = "",
) -> float:  # fmt: skip
    """How often a query's first hit is of its own kind; ties count as such. Queries are the odd items."""
    wrong = 0
    odd = np.arange(1, len(queries), 2)
    for start in range(0, len(odd), _BLOCK):
        rows = odd[start : start + _BLOCK]
        same, across = queries[rows] @ queries.T, queries[rows] @ others.T
        if means is not None and deviations is not None:
            same = (same - means[own]) / deviations[own]
            across = (across - means["image-text"]) / deviations["image-text"]
        same[np.arange(len(rows)), rows] = -np.inf  # the query itself
        wrong += int((same.max(axis=1) >= across.max(axis=1)).sum())
    return wrong / len(odd)


def _off_diagonal(values: np.ndarray) -> np.ndarray:
    return values[~np.eye(len(values), dtype=bool)]
