"""Retrieval metrics of embeddings, by the two definitions of recall that are in use.

Where a query has several right items (an image and its five captions), CLIP-benchmark counts Recall@k as 1 if any of
them is among the first k, and mteb divides those that are by their number (mteb pull requests 1120 and 1505 are about
this). Published tables of image-text retrieval follow the former; it is `recall@k` here, the latter is `recall_mteb@k`.

Ties never flatter: a wrong item exactly as similar as a right one counts as found before it.
"""

from collections.abc import Hashable, Sequence

import numpy as np

from bifocal.errors import EvaluationError
from bifocal.evaluation.relevance import right_answers

_BLOCK_BYTES = 128 * 2**20  # of similarities at a time
_SORTED_FROM = 16  # right items of a query, from which sorting its similarities is faster than a pass for each


def target_ranks(
    queries: np.ndarray,
    items: np.ndarray,
    targets: np.ndarray | None = None,
    query_keys: Sequence[Hashable] | None = None,
    item_keys: Sequence[Hashable] | None = None,
) -> np.ndarray:
    """Return the rank, from 1, at which each query finds the first of its right items by cosine similarity.

    Args:
        queries: (Q, D) unit vectors.
        items: (N, D) unit vectors.
        targets: (Q,) the number of each query's own item; query i belongs to item i when None.
        query_keys, item_keys: what equal contents share, such as the texts themselves or digests of images. Queries of
            equal content have each other's items as right answers, and so have items of equal content.

    Returns:
        (Q,) integers.
    """
    targets = np.arange(len(queries)) if targets is None else np.asarray(targets)
    relevant = right_answers(
        range(len(queries)) if query_keys is None else query_keys,
        range(len(items)) if item_keys is None else item_keys,
        enumerate(targets.tolist()),
    )
    return relevant_ranks(queries, items, relevant, first=1)[:, 0]


def relevant_ranks(
    queries: np.ndarray, items: np.ndarray, relevant: Sequence[Sequence[int]], first: int | None = None
) -> np.ndarray:
    """The ranks, from 1, at which each query finds its right items by cosine similarity.

    The matrix of similarities is made in blocks of 128 MiB and never held.

    Args:
        queries: (Q, D) unit vectors.
        items: (N, D) unit vectors.
        relevant: for each query the numbers of its right items, none twice.
        first: of each query's right items only so many are ranked, those that it finds first; all when None. Metrics of
            the first k need k.

    Returns:
        (Q, M) int32 in rising order, M being the most right items of a query, or `first` if that is less; 0 fills the
        rows of those with fewer.

    Raises:
        EvaluationError: vectors that are not finite or of different dimension, a query without right items, or an item
            that there is none of.
    """
    _require(queries, items, relevant)
    kept = min(max(map(len, relevant)), first or len(items))
    ranks = np.zeros((len(queries), kept), np.int32)  # a text that many images share has thousands of right items
    size = max(1, _BLOCK_BYTES // (4 * len(items)))
    for start in range(0, len(queries), size):
        block = slice(start, start + size)
        scores = queries[block] @ items.T
        right = _padded(relevant[block])
        own = np.take_along_axis(scores, np.maximum(right, 0), axis=1)
        own = np.where(right >= 0, own, -np.inf)
        best_first = -np.sort(-own, axis=1)[:, :kept]  # right items among themselves: the most similar first
        # Wrong items at least as similar stand before a right one, right ones only if they are more similar.
        wrong = _at_least(scores, best_first) - _at_least(own, best_first)
        width = best_first.shape[1]
        ranks[block, :width] = np.where(np.isfinite(best_first), wrong + np.arange(1, width + 1), 0)
    return ranks


def _padded(relevant: Sequence[Sequence[int]]) -> np.ndarray:
    """Return numbers as (rows, most of a row), filled with -1."""
    right = np.full((len(relevant), max(map(len, relevant))), -1, np.int64)
    for row, numbers in enumerate(relevant):
        right[row, : len(numbers)] = numbers
    return right


def _at_least(scores: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """Return how many scores of a row are at least as high as each of its bounds: (rows, bounds)."""
    if bounds.shape[1] < _SORTED_FROM:
        return np.stack([(scores >= bounds[:, n, None]).sum(axis=1) for n in range(bounds.shape[1])], axis=1)
    ordered = np.sort(scores, axis=1)
    below = [np.searchsorted(row, values, side="left") for row, values in zip(ordered, bounds, strict=True)]
    return scores.shape[1] - np.stack(below)


def _require(queries: np.ndarray, items: np.ndarray, relevant: Sequence[Sequence[int]]) -> None:
    for name, vectors in (("queries", queries), ("items", items)):
        if vectors.ndim != 2 or not len(vectors):
            raise EvaluationError(f"The {name} have shape {vectors.shape}; give (number, dimensions), at least one.")
        finite = np.isfinite(vectors).all(axis=1)
        if not finite.all():
            raise EvaluationError(
                f"{(~finite).sum()} of {len(vectors)} {name} have embeddings that are not finite, first number "
                f"{int(np.argmin(finite))}; look at what was embedded there, and at the model's weights."
            )
    if queries.shape[1] != items.shape[1]:
        raise EvaluationError(
            f"Queries have {queries.shape[1]} dimensions and items {items.shape[1]}; embed both with one model."
        )
    if len(relevant) != len(queries):
        raise EvaluationError(f"There are {len(queries)} queries, but right items for {len(relevant)}.")
    for number, numbers in enumerate(relevant):
        if not len(numbers):
            raise EvaluationError(f"Query {number} has no right item; leave it out or mend its relevance.")
        if min(numbers) < 0 or max(numbers) >= len(items) or len(set(numbers)) < len(numbers):
            raise EvaluationError(
                f"Query {number} names the right items {list(numbers)[:10]}, but there are {len(items)}, from 0, and "
                "each may be named once."
            )


def recall_at(ranks: np.ndarray, k: int) -> float:
    """Recall@k as CLIP-benchmark has it: the share of queries that find a right item among the first k.

    Args:
        ranks: (Q,) or (Q, M), see `relevant_ranks`.
    """
    ranks = ranks[:, None] if ranks.ndim == 1 else ranks
    return float((ranks[:, 0] <= k).mean())


def recall_mteb_at(ranks: np.ndarray, k: int, right: np.ndarray | None = None) -> float:
    """Recall@k as mteb has it: of each query's right items the share among the first k; the mean over the queries.

    Args:
        right: (Q,) how many right items each query has, where `ranks` holds only the first k of them or more.
    """
    ranks = ranks[:, None] if ranks.ndim == 1 else ranks
    found = ((ranks > 0) & (ranks <= k)).sum(axis=1)
    return float((found / ((ranks > 0).sum(axis=1) if right is None else right)).mean())


def ndcg_at(ranks: np.ndarray, k: int) -> float:
    """Normalised discounted cumulative gain of the first k, a right item's gain being 1.

    Args:
        ranks: (Q,) or (Q, M), see `relevant_ranks`; of the right items at least the first k.
    """
    ranks = ranks[:, None] if ranks.ndim == 1 else ranks
    gains = np.where((ranks > 0) & (ranks <= k), 1.0 / np.log2(np.maximum(ranks, 1) + 1.0), 0.0).sum(axis=1)
    ideal = np.cumsum(1.0 / np.log2(np.arange(1, k + 1) + 1.0))
    return float((gains / ideal[np.minimum((ranks > 0).sum(axis=1), k) - 1]).mean())


def retrieval_metrics(
    ranks: np.ndarray, ks: Sequence[int] = (1, 5, 10), items: int | None = None, right: np.ndarray | None = None
) -> dict[str, float]:
    """Both recalls and nDCG for each k, and the mean reciprocal rank of the first right item, by name.

    Args:
        ranks: (Q,) or (Q, M), see `relevant_ranks`.
        items: how many there are to find, so that a k that is larger can be refused.
        right: (Q,) how many right items each query has, where `ranks` holds only the first of them, as many as the
            largest k or more.

    Raises:
        EvaluationError: a k below 1 or above the number of items.
    """
    wrong = next((k for k in ks if k < 1 or (items is not None and k > items)), None)
    if wrong is not None:
        raise EvaluationError(f"k={wrong} does not go with {items} items; choose k from 1 to their number.")
    ranks = ranks[:, None] if ranks.ndim == 1 else ranks
    metrics = {f"recall@{k}": recall_at(ranks, k) for k in ks}
    metrics["mrr"] = float((1.0 / ranks[:, 0]).mean())
    metrics |= {f"ndcg@{k}": ndcg_at(ranks, k) for k in ks}
    if ranks.shape[1] > 1 or (right is not None and right.max() > 1):
        metrics |= {f"recall_mteb@{k}": recall_mteb_at(ranks, k, right) for k in ks}
    return metrics
