"""What is left of a search when vectors are shortened (Matryoshka, arXiv 2205.13147) or kept as bytes or bits."""

from collections.abc import Sequence

import numpy as np

from bifocal.errors import EvaluationError
from bifocal.evaluation.retrieval import recall_at, relevant_ranks


def shortened(vectors: np.ndarray, dimensions: int) -> np.ndarray:
    """The first dimensions of unit vectors, made unit again."""
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
    """Recall@k for each number of dimensions; a power of two from 8 on and the whole when none are given."""
    whole = queries.shape[1]
    chosen = list(dimensions) or [*(2**n for n in range(3, 20) if 2**n < whole), whole]
    return {
        d: recall_at(relevant_ranks(shortened(queries, d), shortened(items, d), relevant, 1), k)
        for d in sorted(set(chosen))
    }


def by_precision(
    queries: np.ndarray, items: np.ndarray, relevant: Sequence[Sequence[int]], k: int = 5
) -> dict[str, dict[str, float]]:
    """Recall@k and bytes of a vector, by precision of the items: sentence-transformers' quantisation.

    Queries stay in float32 against bytes, as its `semantic_search` has it; against bits they are bits as well, and the
    number of equal bits is the similarity.
    """
    from sentence_transformers.util.quantization import quantize_embeddings

    dimensions = queries.shape[1]
    recall = recall_at(relevant_ranks(queries, items, relevant, 1), k)
    found = {"float32": {"recall": recall, "bytes": 4.0 * dimensions}}
    small = np.asarray(quantize_embeddings(items, precision="int8", calibration_embeddings=items))
    low, high = items.min(0), items.max(0)
    restored = ((small.astype(np.float32) + 128.0) / 255.0 * (high - low) + low).astype(np.float32)
    found["int8"] = {"recall": recall_at(relevant_ranks(queries, restored, relevant, 1), k), "bytes": float(dimensions)}
    if dimensions % 8 == 0:
        bits = [
            np.unpackbits(np.asarray(quantize_embeddings(v, precision="ubinary")), axis=1).astype(np.float32) * 2.0
            - 1.0
            for v in (queries, items)
        ]
        recall = recall_at(relevant_ranks(bits[0], bits[1], relevant, 1), k)
        found["binary"] = {"recall": recall, "bytes": dimensions / 8}
    return found
