"""The consistency filter: a pair stays if its positive is among the nearest (arXiv 2212.03533, section 3)."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from bifocal.data.filters import Consistency
from bifocal.data.row_names import row_name, select_rows
from bifocal.data.skips import Skip, Skipped
from bifocal.errors import DataError, first_line
from bifocal.files import replace_file


def consistent(pairs: Any, settings: Consistency, skipped: Skipped, name: str) -> Any:
    """The pairs of a `datasets.Dataset` that pass; the others go into the account as dropped.

    The positives of each pool of rows are ranked for each of its queries. Texts that are equal to the positive count as
    it. Which rows pass is kept beside the data set's cache.

    Raises:
        DataError: rows without queries, or no such model.
    """
    if "query" not in pairs.column_names:
        raise DataError(f"'{name}' has no text pairs, and the consistency filter compares queries and positives.")
    ranks = _ranks_kept(pairs, settings)
    passes = ranks < settings.nearest
    bad = np.flatnonzero(~passes)
    skips = [
        Skip(row_name(pairs, int(row)), "inconsistent pair", f"positive at rank {ranks[row] + 1}", dropped=True)
        for row in bad
    ]
    skipped.add(name, 0, skips)
    return pairs if not len(bad) else select_rows(pairs, np.flatnonzero(passes).tolist())


def _ranks_kept(pairs: Any, settings: Consistency) -> np.ndarray:
    from datasets.fingerprint import Hasher

    files = pairs.cache_files
    key = Hasher.hash([pairs._fingerprint, json.dumps(settings.model_dump(exclude={"nearest"}))])
    path = Path(files[0]["filename"]).with_name(f"ranks-{key}.npy") if files else None
    if path is not None and path.exists():
        return np.load(path)
    ranks = _ranks(pairs, settings)
    if path is not None:
        with replace_file(path) as scratch:
            np.save(scratch, ranks)
    return ranks


def _ranks(pairs: Any, settings: Consistency) -> np.ndarray:
    """The rank of each row's positive among those of its pool, from 0."""
    from sentence_transformers import SentenceTransformer

    try:
        model = SentenceTransformer(settings.model)
    except (OSError, ValueError) as error:
        raise DataError(f"'{settings.model}' is no sentence-transformers model ({first_line(error)}).") from error
    ranks = np.empty(len(pairs), dtype=np.int64)
    for start in range(0, len(pairs), settings.pool):
        rows = pairs[start : start + settings.pool]
        queries, positives = (
            [text[0] if isinstance(text, list) else text for text in rows[c]] for c in ("query", "positive")
        )
        different = list(dict.fromkeys(positives))
        place = {text: number for number, text in enumerate(different)}
        found = [
            model.encode(texts, normalize_embeddings=True, convert_to_numpy=True) for texts in (queries, different)
        ]
        for first in range(0, len(queries), 1024):
            scores = found[0][first : first + 1024] @ found[1].T
            own = np.array([place[text] for text in positives[first : first + 1024]])
            best = scores[np.arange(len(own)), own]
            ranks[start + first : start + first + len(own)] = (scores > best[:, None]).sum(1)
    return ranks
