"""Recall with shortened vectors (Matryoshka, arXiv 2205.13147), and with vectors quantised to bytes or bits."""

from collections.abc import Sequence

import numpy as np

from bifocal.errors import EvaluationError
from bifocal.evaluation.retrieval import recall_at, relevant_ranks


def shortened(vectors: np.ndarray, dimensions: int) -> np.ndarray:
    """Return the first dimensions of unit vectors, normalised again.

    Raises:
        EvaluationError: if the vectors have fewer dimensions.
    """
    if not 1 <= dimensions <= vectors.shape[1]:
        raise EvaluationError(f"{dimensions} dimensions cannot be taken of {vectors.shape[1]}.")
    cut = vectors[:, :dimensions]
    return cut / np.maximum(np.linalg.norm(cut, axis=1, keepdims=True), 1e-12)


def by_dimension(
    queries: np.ndarray,
    items: np.ndarray,
    relevant: Sequence[Sequence[int]],
    dimensions: Sequence[int] = (),
    k: int = 5,
) -> dict[int, float]:
    """Return Recall@k by number of dimensions.

    Args:
        queries: (Q, D) unit vectors.
        items: (N, D) unit vectors.
        relevant: numbers of the right items of each query.
        dimensions: numbers of dimensions to measure; the powers of two from 8 on and D if empty.
        k: the k of Recall@k.
    """
    whole = queries.shape[1]
    chosen = list(dimensions) or [*(2**n for n in range(3, 20) if 2**n < whole), whole]
    return {
        d: recall_at(relevant_ranks(shortened(queries, d), shortened(items, d), relevant, 1), k)
        for d in sorted(set(chosen))
    }


def by_precision(
    queries: np.ndarray, items: np.ndarray, relevant: Sequence[Sequence[int]], k: int = 5
) -> dict[str, dict[str, float]]:
    """Return Recall@k and the bytes of a vector by precision of the items, with sentence-transformers' quantisation.

    Items in int8 are searched by float32 queries, as in its `semantic_search`. Binary items are searched by binary
    queries, and the similarity is the number of equal bits.

    Args:
        queries: (Q, D) unit vectors.
        items: (N, D) unit vectors.
        relevant: numbers of the right items of each query.
        k: the k of Recall@k.
    """
    from sentence_transformers.util.quantization import quantize_embeddings

    dimensions = queries.shape[1]
    recall = recall_at(relevant_ranks(queries, items, relevant, 1), k)
    measured = {"float32": {"recall": recall, "bytes": 4.0 * dimensions}}
    small = np.asarray(quantize_embeddings(items, precision="int8", calibration_embeddings=items))
    low, high = items.min(0), items.max(0)
    restored = ((small.astype(np.float32) + 128.0) / 255.0 * (high - low) + low).astype(np.float32)
    recall = recall_at(relevant_ranks(queries, restored, relevant, 1), k)
    measured["int8"] = {"recall": recall, "bytes": float(dimensions)}
    if dimensions % 8 == 0:
        bits = [
            np.unpackbits(np.asarray(quantize_embeddings(v, precision="ubinary")), axis=1).astype(np.float32) * 2.0
            - 1.0
            for v in (queries, items)
        ]
        recall = recall_at(relevant_ranks(bits[0], bits[1], relevant, 1), k)
        measured["binary"] = {"recall": recall, "bytes": dimensions / 8}
    return measured
