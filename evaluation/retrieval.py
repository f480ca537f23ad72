"""Retrieval metrics of embeddings where each query has exactly one right item."""

from collections.abc import Sequence

import numpy as np


def target_ranks(queries: np.ndarray, items: np.ndarray, targets: np.ndarray | None = None) -> np.ndarray:
    """The rank, from 1, at which each query finds its item by cosine similarity.

    An item exactly as similar as the right one counts as found before it, so that ties never flatter.

    Args:
        queries: (Q, D) unit vectors.
        items: (N, D) unit vectors.
        targets: (Q,) the number of each query's right item; query i belongs to item i when None.

    Returns:
        (Q,) integers.
    """
    targets = np.arange(len(queries)) if targets is None else targets
    scores = queries @ items.T
    right = np.take_along_axis(scores, targets[:, None], axis=1)
    return (scores >= right).sum(axis=1)


def recall_at(ranks: np.ndarray, k: int) -> float:
    """Recall@k with one right item: the share of queries that find it among the first k."""
    return float((ranks <= k).mean())


def retrieval_metrics(ranks: np.ndarray, ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """Recall@k for each k and the mean reciprocal rank, by name."""
    metrics = {f"recall@{k}": recall_at(ranks, k) for k in ks}
    metrics["mrr"] = float((1.0 / ranks).mean())
    return metrics
