"""Retrieval metrics of embeddings, by the two definitions of recall in use.

If a query has several right items (an image and its five captions), CLIP-benchmark counts Recall@k as 1 if any of them
is among the first k; mteb divides the number of those among the first k by the number of all (mteb pull requests 1120
and 1505 discuss this). Published tables of image-text retrieval follow CLIP-benchmark. Its definition is `recall@k`
here, mteb's is `recall_mteb@k`.

A wrong item exactly as similar as a right one ranks before it, so that ties never improve a metric.
"""

from collections.abc import Hashable, Sequence

import numpy as np

from bifocal.errors import EvaluationError
from bifocal.evaluation.relevance import right_answers

_BLOCK_BYTES = 128 * 2**20  # size of a block of similarities
_SORTED_FROM = 16  # from this many right items, sorting a query's similarities is faster than one pass per item


def target_ranks(
    queries: np.ndarray,
    items: np.ndarray,
    targets: np.ndarray | None = None,
    query_keys: Sequence[Hashable] | None = None,
    item_keys: Sequence[Hashable] | None = None,
) -> np.ndarray:
    """Return the rank, from 1, of each query's first right item by cosine similarity.

    Args:
        queries: (Q, D) unit vectors.
        items: (N, D) unit vectors.
        targets: (Q,) number of each query's own item; item i for query i if None.
        query_keys, item_keys: keys that equal contents share, such as the texts themselves or digests of images.
            Queries of equal content share their right items, and items of equal content are right together.

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
    """Return the ranks, from 1, of each query's right items by cosine similarity.

    Similarities are computed in blocks of 128 MiB, so that the whole matrix is never in memory.

    Args:
        queries: (Q, D) unit vectors.
        items: (N, D) unit vectors.
        relevant: numbers of the right items of each query, without duplicates.
        first: number of right items per query to rank, the most similar ones; all if None. Metrics at k need k.

    Returns:
        (Q, M) int32 in ascending order. M is the largest number of right items of a query, at most `first`; rows with
        fewer end with zeros.

    Raises:
        EvaluationError: if vectors are not finite or differ in dimension, a query has no right item, or a number is
            not one of an item.
    """
    _require_valid(queries, items, relevant)
    width = min(max(map(len, relevant)), first or len(items))
    ranks = np.zeros((len(queries), width), np.int32)  # a text that many images share has thousands of right items
    size = max(1, _BLOCK_BYTES // (4 * len(items)))
    for start in range(0, len(queries), size):
        block = slice(start, start + size)
        scores = queries[block] @ items.T
        right = _padded(relevant[block])
        own = np.take_along_axis(scores, np.maximum(right, 0), axis=1)
        own = np.where(right >= 0, own, -np.inf)
        best_first = -np.sort(-own, axis=1)[:, :width]  # similarities of the right items
        # Wrong items at least as similar rank before a right one; right ones do only if they are more similar.
        wrong = _count_at_least(scores, best_first) - _count_at_least(own, best_first)
        filled = best_first.shape[1]
        ranks[block, :filled] = np.where(np.isfinite(best_first), wrong + np.arange(1, filled + 1), 0)
    return ranks


def _padded(relevant: Sequence[Sequence[int]]) -> np.ndarray:
    """Return the numbers as an array, with shorter rows filled with -1."""
    right = np.full((len(relevant), max(map(len, relevant))), -1, np.int64)
    for row, numbers in enumerate(relevant):
        right[row, : len(numbers)] = numbers
    return right


def _count_at_least(scores: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """Return the number of a row's scores that are at least as high as each of its bounds: (rows, bounds)."""
    if bounds.shape[1] < _SORTED_FROM:
        return np.stack([(scores >= bounds[:, n, None]).sum(axis=1) for n in range(bounds.shape[1])], axis=1)
    ordered = np.sort(scores, axis=1)
    below = [np.searchsorted(row, values, side="left") for row, values in zip(ordered, bounds, strict=True)]
    return scores.shape[1] - np.stack(below)


def _require_valid(queries: np.ndarray, items: np.ndarray, relevant: Sequence[Sequence[int]]) -> None:
    for name, vectors in (("queries", queries), ("items", items)):
        if vectors.ndim != 2 or not len(vectors):
            raise EvaluationError(f"The {name} have shape {vectors.shape}; give (number, dimensions), at least one.")
        finite = np.isfinite(vectors).all(axis=1)
        if not finite.all():
            raise EvaluationError(
                f"{(~finite).sum()} of {len(vectors)} {name} have embeddings that are not finite, first number "
                f"{int(np.argmin(finite))}; check that input and the model's weights."
            )
    if queries.shape[1] != items.shape[1]:
        raise EvaluationError(
            f"Queries have {queries.shape[1]} dimensions and items {items.shape[1]}; embed both with one model."
        )
    if len(relevant) != len(queries):
        raise EvaluationError(f"There are {len(queries)} queries, but right items for {len(relevant)}.")
    for number, numbers in enumerate(relevant):
        if not len(numbers):
            raise EvaluationError(f"Query {number} has no right item; remove it or correct its relevance.")
        if min(numbers) < 0 or max(numbers) >= len(items) or len(set(numbers)) < len(numbers):
            raise EvaluationError(
                f"Query {number} names the right items {list(numbers)[:10]}, but there are {len(items)}, from 0, and "
                "each may be named once."
            )


def recall_at(ranks: np.ndarray, k: int) -> float:
    """Return Recall@k by CLIP-benchmark's definition: the share of queries with a right item among the first k.

    Args:
        ranks: (Q,) or (Q, M), see `relevant_ranks`.
        k: number of first items.
    """
    ranks = ranks[:, None] if ranks.ndim == 1 else ranks
    return float((ranks[:, 0] <= k).mean())


def recall_curve(ranks: np.ndarray, last: int) -> list[float]:
    """Return Recall@1 to Recall@last, see `recall_at`."""
    return [recall_at(ranks, k) for k in range(1, last + 1)]


def recall_mteb_at(ranks: np.ndarray, k: int, right: np.ndarray | None = None) -> float:
    """Return Recall@k by mteb's definition: the mean share of a query's right items that are among the first k.

    Args:
        ranks: (Q,) or (Q, M), see `relevant_ranks`.
        k: number of first items.
        right: (Q,) number of right items of each query, if `ranks` holds only the first k or more of them.
    """
    ranks = ranks[:, None] if ranks.ndim == 1 else ranks
    hits = ((ranks > 0) & (ranks <= k)).sum(axis=1)
    return float((hits / ((ranks > 0).sum(axis=1) if right is None else right)).mean())


def ndcg_at(ranks: np.ndarray, k: int) -> float:
    """Return the normalised discounted cumulative gain of the first k. The gain of a right item is 1.

    Args:
        ranks: (Q,) or (Q, M), see `relevant_ranks`, with at least the first k right items.
        k: number of first items.
    """
    ranks = ranks[:, None] if ranks.ndim == 1 else ranks
    gains = np.where((ranks > 0) & (ranks <= k), 1.0 / np.log2(np.maximum(ranks, 1) + 1.0), 0.0).sum(axis=1)
    ideal = np.cumsum(1.0 / np.log2(np.arange(1, k + 1) + 1.0))
    return float((gains / ideal[np.minimum((ranks > 0).sum(axis=1), k) - 1]).mean())


def retrieval_metrics(
    ranks: np.ndarray, ks: Sequence[int] = (1, 5, 10), items: int | None = None, right: np.ndarray | None = None
) -> dict[str, float]:
    """Return both recalls and nDCG at each k, and the mean reciprocal rank of the first right item, by name.

    Args:
        ranks: (Q,) or (Q, M), see `relevant_ranks`.
        ks: numbers of first items.
        items: number of items, which no k may exceed.
        right: (Q,) number of right items of each query, if `ranks` holds only the first of them: as many as the
            largest k or more.

    Raises:
        EvaluationError: if a k is below 1 or above the number of items.
    """
    wrong = next((k for k in ks if k < 1 or (items is not None and k > items)), None)
    if wrong is not None:
        raise EvaluationError(f"k={wrong} is impossible with {items} items; choose k from 1 to their number.")
    ranks = ranks[:, None] if ranks.ndim == 1 else ranks
    metrics = {f"recall@{k}": recall_at(ranks, k) for k in ks}
    metrics["mrr"] = float((1.0 / ranks[:, 0]).mean())
    metrics |= {f"ndcg@{k}": ndcg_at(ranks, k) for k in ks}
    if ranks.shape[1] > 1 or (right is not None and right.max() > 1):
        metrics |= {f"recall_mteb@{k}": recall_mteb_at(ranks, k, right) for k in ks}
    return metrics
