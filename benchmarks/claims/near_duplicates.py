"""Telling a caption apart from its near-duplicates."""

import json
from collections.abc import Callable

import numpy as np
from sentence_transformers import SentenceTransformer

from benchmarks.claims.datasets import ClaimData, load_minilm
from bifocal.files import replace_file
from bifocal.modeling import BifocalModel

NEAR = "right among 21 near-duplicates"
NearDuplicates = tuple[list[str], list[str], np.ndarray]


def near_duplicates(data: ClaimData) -> NearDuplicates:
    """Return the near-duplicates by MiniLM, which no small tower is made from."""
    return near_duplicates_by(_by_minilm, data, "near-duplicates.json")


def near_duplicates_by(encode: Callable[[list[str]], np.ndarray], data: ClaimData, name: str) -> NearDuplicates:
    """Return queries, texts, and the numbers of each query's candidates: the right one and the 20 most similar others.

    Args:
        encode: function that returns unit vectors; similar texts are those that it thinks similar.
        name: name of the file that keeps the numbers.
    """
    queries, items = ([texts[number] for texts in data.captions.test] for number in (0, 1))
    path = data.out / name
    with data.lock:
        if not path.exists():
            vectors = encode(items)
            scores = vectors @ vectors.T
            np.fill_diagonal(scores, -1.0)
            nearest = np.argsort(-scores, axis=1, kind="stable")[:, :20]
            candidates = np.concatenate([np.arange(len(items))[:, None], nearest], axis=1)
            with replace_file(path) as scratch:
                scratch.write_text(json.dumps(candidates.tolist()))
    return queries, items, np.array(json.loads(path.read_text()))


def _by_minilm(texts: list[str]) -> np.ndarray:
    return load_minilm(SentenceTransformer).encode(texts, normalize_embeddings=True, batch_size=64)


def right_among(model: BifocalModel, chosen: NearDuplicates) -> float:
    """Return how often a query's right text is nearer than its 20 near-duplicates."""
    queries, items, candidates = chosen
    query_vectors, item_vectors = (
        np.asarray(model.encode_text(texts, batch_size=128, show_progress=False)) for texts in (queries, items)
    )
    scores = np.einsum("nd,nkd->nk", query_vectors, item_vectors[candidates])
    return float((scores[:, 1:].max(axis=1) < scores[:, 0]).mean())
