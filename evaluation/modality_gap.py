"""The modality gap (arXiv 2203.02053): the distance between texts and images, and its effect on an index of both."""

from dataclasses import dataclass

import numpy as np

from bifocal.errors import EvaluationError

_KINDS = ("image-image", "text-text", "image-text")
_BLOCK = 2000  # queries at a time
_SHOWN = 400  # items whose similarities the histograms show


@dataclass
class ModalityGap:
    """The modality gap of a model on pairs of an image and a text.

    Args:
        metrics: `centroid_distance` is the distance between the mean image and the mean text. `matching_cosine` is the
            mean similarity of images and their texts; `image_text_cosine`, `image_image_cosine` and `text_text_cosine`
            are those of pairs that do not match. `mixed/text_wrong_kind` and `mixed/image_wrong_kind` are the shares of
            queries whose first hit in an index of texts and images is of the query's own kind, although the right
            answer is of the other kind; `.../calibrated` are the same with calibrated similarities.
        similarities: samples of similarities by pair of kinds, for histograms.
    """

    metrics: dict[str, float]
    similarities: dict[str, np.ndarray]


def measure_gap(images: np.ndarray, texts: np.ndarray) -> ModalityGap:
    """Measure the modality gap on images and their texts.

    The mixed index holds all images and all texts except the query itself; the one right answer is the query's partner
    of the other kind. Calibration subtracts from each similarity the mean of non-matching pairs of its two kinds and
    divides by their standard deviation, so that both kinds compete on equal terms. It is fitted on the even items and
    measured on the odd ones, which are the only queries.

    Args:
        images, texts: (N, D) unit vectors; row i of both is a pair.

    Raises:
        EvaluationError: if their numbers differ, or there are fewer than four pairs.
    """
    if images.shape != texts.shape or len(images) < 4:
        raise EvaluationError(f"There are {len(images)} images and {len(texts)} texts; give at least four pairs.")
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
    return ModalityGap(metrics, similarities)


def _wrong_kind(
    queries: np.ndarray, others: np.ndarray, means: dict[str, float] | None = None,
    deviations: dict[str, float] | None = None, own: str = "",
) -> float:  # fmt: skip
    """Return the share of queries (the odd items) whose first hit is of their own kind; ties count as such."""
    wrong = 0
    odd = np.arange(1, len(queries), 2)
    for start in range(0, len(odd), _BLOCK):
        rows = odd[start : start + _BLOCK]
        same_kind, other_kind = queries[rows] @ queries.T, queries[rows] @ others.T
        if means is not None and deviations is not None:
            same_kind = (same_kind - means[own]) / deviations[own]
            other_kind = (other_kind - means["image-text"]) / deviations["image-text"]
        same_kind[np.arange(len(rows)), rows] = -np.inf  # the query itself
        wrong += int((same_kind.max(axis=1) >= other_kind.max(axis=1)).sum())
    return wrong / len(odd)


def _off_diagonal(values: np.ndarray) -> np.ndarray:
    return values[~np.eye(len(values), dtype=bool)]
