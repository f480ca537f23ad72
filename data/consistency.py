"""The consistency filter: keep a pair if its positive is among the nearest (arXiv 2212.03533, section 3)."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from bifocal.data.filters import Consistency
from bifocal.data.row_names import row_name, select_rows
from bifocal.data.skips import SkipLog, SkippedRow
from bifocal.embedding.embed import EmbedSettings, embed_items
from bifocal.embedding.items import Item
from bifocal.embedding.models import EmbeddingModel, load_model, model_files_state
from bifocal.errors import DataError, ModelError
from bifocal.files import replace_file
from bifocal.modeling.dtype_bifocal import default_device, resolve_dtype


def filter_consistent(pairs: Any, settings: Consistency, skipped: SkipLog, name: str) -> Any:
    """Return the pairs of a `datasets.Dataset` that pass; the others are logged as filtered.

    The positives of each pool of rows are ranked for each of its queries, both with the model's prompts if it has
    them. A text that equals the positive counts as the positive. The ranks are cached next to the data set's cache, by
    the rows, the settings and the model's files.

    Raises:
        DataError: if the rows have no queries.
        ModelError: if the model cannot be loaded, or its embeddings are not finite.
    """
    if "query" not in pairs.column_names:
        raise DataError(f"'{name}' has no queries, and the consistency filter needs text pairs. Remove consistency.")
    ranks = _cached_ranks(pairs, settings)
    passes = ranks < settings.top_k
    bad = np.flatnonzero(~passes)
    skips = [
        SkippedRow(row_name(pairs, int(row)), "inconsistent pair", f"positive at rank {ranks[row] + 1}", filtered=True)
        for row in bad
    ]
    skipped.add(name, 0, skips)
    return pairs if not len(bad) else select_rows(pairs, np.flatnonzero(passes).tolist())


def _cached_ranks(pairs: Any, settings: Consistency) -> np.ndarray:
    from datasets.fingerprint import Hasher

    files = pairs.cache_files
    dtype = resolve_dtype(settings.dtype, default_device())
    facts = settings.model_dump(exclude={"top_k", "dtype"}) | ({} if dtype == "model" else {"dtype": dtype})
    key = Hasher.hash(["with prompts", pairs._fingerprint, json.dumps(facts), model_files_state(settings.model)])
    path = Path(files[0]["filename"]).with_name(f"ranks-{key}.npy") if files else None
    if path is not None and path.exists():
        return np.load(path)
    ranks = _ranks(pairs, settings)
    if path is not None:
        with replace_file(path) as scratch:
            np.save(scratch, ranks)
    return ranks


def _ranks(pairs: Any, settings: Consistency) -> np.ndarray:
    """Return the rank of each row's positive among those of its pool, from 0."""
    model = load_model(settings.model, settings.dtype)
    ranks = np.empty(len(pairs), dtype=np.int64)
    for start in range(0, len(pairs), settings.pool_size):
        rows = pairs[start : start + settings.pool_size]
        queries, positives = (
            [text[0] if isinstance(text, list) else text for text in rows[c]] for c in ("query", "positive")
        )
        different = list(dict.fromkeys(positives))
        number_of = {text: number for number, text in enumerate(different)}
        query_vectors, vectors = _embed(model, queries, "query"), _embed(model, different, "document")
        for first in range(0, len(queries), 1024):
            scores = query_vectors[first : first + 1024] @ vectors.T
            own = np.array([number_of[text] for text in positives[first : first + 1024]])
            best = scores[np.arange(len(own)), own]
            ranks[start + first : start + first + len(own)] = (scores > best[:, None]).sum(1)
    return ranks


def _embed(model: EmbeddingModel, texts: list[str], role: str) -> np.ndarray:
    items = [Item("", text) for text in texts]
    results = embed_items(items, model, EmbedSettings(role, prompt=None))  # the model's own prompt
    vectors = [result.vector for result in results if result.vector is not None]
    if len(vectors) < len(texts):
        raise ModelError(
            f"'{model.name}' gives embeddings that are not finite for {len(texts) - len(vectors):,} of {len(texts):,} "
            "texts. Check its weights and the dtype it is loaded in."
        )
    return np.stack(vectors)
