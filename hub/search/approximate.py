"""Approximate FAISS indexes: a query is compared with the vectors in the regions nearest to it only.

Rows of different kinds lie in different regions, and FAISS may look for a rare kind in regions that have none of it.
Each group of rows that is searched as a whole therefore has an index of its own. Groups of fewer than `MIN_ROWS` rows
are searched exhaustively, which is fast enough.

Regions are lists of the vectors nearest to a centre (IVF), not a graph (HNSW): a graph takes three times as long to
build, which happens after every change of the table, and is not faster to search (`benchmarks/approximate_search.py`).
"""

import hashlib
import json
import logging
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from bifocal.embedding.items import KINDS, normalize
from bifocal.hub.search.atomic import replace_file
from bifocal.hub.search.faiss_indexes import (
    WRITE_ERRORS,
    delete_earlier,
    new_faiss_index,
    table_state,
    write_faiss_index,
)
from bifocal.hub.search.settings import Variant
from bifocal.hub.search.table import TableSnapshot

logger = logging.getLogger(__name__)

MIN_ROWS = 50_000
_TARGET_RECALL = 0.99  # of what all regions would give
_NEIGHBOURS = 10  # of which recall is measured
_QUERIES = 512  # of each kind: as many regions are searched as one half needs, and recall is that of the other half
_LISTS = 4  # times the square root of the number of rows
_TRAINING_ROWS = 40  # for each list; FAISS warns below 39
_ITERATIONS = 10
_QUERIES_AT_ONCE = 16  # of 20 and more, FAISS multiplies matrices: then results would depend on other queries


@dataclass
class ApproximateIndex:
    """The FAISS indexes of a table's groups of rows. Ids are rows of the table.

    Args:
        groups: FAISS index by name of the group.
        recall: recall@10 of vectors of the table as queries, the lowest over kinds of queries and groups; None if all
            groups are searched exhaustively.
        queries: number of these queries by kind.
    """

    groups: Mapping[str, Any]
    recall: float | None
    queries: Mapping[str, int]

    def search(self, queries: np.ndarray, k: int, groups: Sequence[str]) -> list[np.ndarray]:
        """Return, for each query, the k rows of each group that are nearest to it among those compared.

        Args:
            queries: unit vectors (queries, leading dimensions).
        """
        nearest: list[list[np.ndarray]] = [[] for _ in queries]
        for group in groups:
            if group in self.groups:
                for of_query, rows in zip(nearest, _search(self.groups[group], queries, k), strict=True):
                    of_query.append(rows)
        return [np.concatenate(of_query) if of_query else np.empty(0, np.int64) for of_query in nearest]

    def in_words(self) -> str:
        """Return how good the index is, for those who search it."""
        if self.recall is None:
            return f"Exhaustive search, since no kind has {MIN_ROWS:,} rows."
        queries = " and ".join(f"{count} {kind}s" for kind, count in self.queries.items())
        recall = f"recall@{_NEIGHBOURS} is {math.floor(1000 * self.recall) / 1000:.3f}"
        return f"Approximate search: {recall}, measured with {queries} of the index as queries."


def open_approximate_index(
    folder: Path, snapshot: TableSnapshot, groups: np.ndarray, kinds: np.ndarray, variant: Variant, oversampling: int
) -> ApproximateIndex:
    """Return the approximate index of a table: read from its files, or built and, if possible, written to them.

    Args:
        folder: folder of the FAISS indexes.
        groups: name of the group of each row.
        kinds: kind of each row.
        variant: dimensions and precision.
        oversampling: candidates for each hit, see `SearchSnapshot.rank`.
    """
    name, state = variant.file_name, table_state(snapshot)
    facts = folder / f"{name}.{state}.json"
    names, counts = np.unique(groups, return_counts=True)
    paths = {group: facts.with_name(f"{name}-{group}.{state}.faiss") for group in names.tolist()}
    # Damaged files raise errors of many kinds, MemoryError among them.
    with suppress(Exception):
        return _read(facts, paths, dict(zip(paths, counts.tolist(), strict=True)), variant.dim)
    built = _build(snapshot, groups, kinds, variant, oversampling)
    with suppress(*WRITE_ERRORS):
        for group, path in paths.items():
            write_faiss_index(built.groups[group], path)
        values = {"recall": built.recall, "queries": dict(built.queries),
                  "files": {group: _hash(path) for group, path in paths.items()}}  # fmt: skip
        with replace_file(facts) as temporary:
            temporary.write_text(json.dumps(values) + "\n", encoding="utf-8")
        delete_earlier(folder, name, state)
    return built


def _read(facts: Path, paths: Mapping[str, Path], counts: Mapping[str, int], dim: int) -> ApproximateIndex:
    import faiss

    values = json.loads(facts.read_text(encoding="utf-8"))
    indexes: dict[str, Any] = {}
    for group, path in paths.items():
        if _hash(path) != values["files"][group]:
            raise ValueError(path)
        indexes[group] = faiss.read_index(str(path))
        if (indexes[group].ntotal, indexes[group].d) != (counts[group], dim):
            raise ValueError(path)
    recall = values["recall"]
    return ApproximateIndex(indexes, None if recall is None else float(recall), dict(values["queries"]))


def _hash(path: Path) -> str:
    content = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(2**20):
            content.update(block)
    return content.hexdigest()


def _build(
    snapshot: TableSnapshot, groups: np.ndarray, kinds: np.ndarray, variant: Variant, oversampling: int
) -> ApproximateIndex:
    import faiss

    indexes: dict[str, Any] = {}
    large = []
    for group in np.unique(groups).tolist():
        rows = np.flatnonzero(groups == group)
        if len(rows) < MIN_ROWS:
            flat = new_faiss_index(variant.dim, variant.precision)
            sample = _sample(rows, MIN_ROWS)
            indexes[group] = faiss.IndexIDMap(flat)
        else:
            large.append(group)
            lists = int(_LISTS * math.sqrt(len(rows)))
            sample = _sample(rows, _TRAINING_ROWS * lists)
            indexes[group] = _new_ivf(variant, lists)
        if not indexes[group].is_trained:
            indexes[group].train(_leading(_vectors(snapshot, sample), variant.dim))
    for first_row, vectors in _parts(snapshot):
        in_part = groups[first_row : first_row + len(vectors)]
        for group in np.unique(in_part).tolist():
            rows = np.flatnonzero(in_part == group)
            indexes[group].add_with_ids(_leading(vectors[rows], variant.dim), first_row + rows)
    if large:
        logger.warning(f"Building an approximate index of {len(groups):,} rows, which can take minutes.")
    queries = {kind: _sample(np.flatnonzero(kinds == kind), _QUERIES) for kind in KINDS if (kinds == kind).any()}
    recalls = [_tune(indexes[group], snapshot, groups == group, queries, variant.dim, oversampling) for group in large]
    counts = {kind: len(rows[1::2]) for kind, rows in queries.items()}
    return ApproximateIndex(indexes, min(recalls, default=None), counts if large else {})


def _new_ivf(variant: Variant, lists: int) -> Any:
    import faiss

    kind = cast(Any, faiss)
    centres, metric = faiss.IndexFlatIP(variant.dim), faiss.METRIC_INNER_PRODUCT
    if variant.precision == "float32":
        index = kind.IndexIVFFlat(centres, variant.dim, lists, metric)
    else:
        index = kind.IndexIVFScalarQuantizer(centres, variant.dim, lists, kind.ScalarQuantizer.QT_8bit, metric)
    index.cp.niter, index.cp.max_points_per_centroid = _ITERATIONS, _TRAINING_ROWS
    return index


def _tune(
    index: Any, snapshot: TableSnapshot, members: np.ndarray, queries: Mapping[str, np.ndarray], dim: int,
    oversampling: int,
) -> float:  # fmt: skip
    """Choose how many regions are searched, and return the lowest recall over kinds of queries.

    A hit counts as found if it is among the candidates, since their whole vectors are compared then.

    Args:
        members: which rows of the table are in the index.
        queries: rows whose vectors are the queries, by kind.
    """
    rows = np.concatenate(list(queries.values()))
    kinds = np.repeat(list(queries), [len(of_kind) for of_kind in queries.values()])
    for_tuning = np.concatenate([np.arange(len(of_kind)) % 2 == 0 for of_kind in queries.values()])
    vectors = _vectors(snapshot, rows)
    wanted = _nearest(snapshot, members, vectors, rows)
    leading, count = _leading(vectors, dim), oversampling * _NEIGHBOURS

    def recall(among: np.ndarray) -> float:
        by_kind: dict[str, list[float]] = defaultdict(list)
        for query, nearest in zip(np.flatnonzero(among), _search(index, leading[among], count + 1), strict=True):
            others = nearest[nearest != rows[query]][:count]
            by_kind[kinds[query]].append(len(np.intersect1d(others, wanted[query])) / _NEIGHBOURS)
        return float(min(map(np.mean, by_kind.values())))

    index.nprobe = index.nlist
    target = _TARGET_RECALL * recall(for_tuning)  # less than 1 by fewer dimensions or bytes
    index.nprobe = 1
    while recall(for_tuning) < target:
        index.nprobe = min(2 * index.nprobe, index.nlist)
    return recall(~for_tuning)


def _nearest(snapshot: TableSnapshot, members: np.ndarray, queries: np.ndarray, own_rows: np.ndarray) -> np.ndarray:
    """Return the rows (queries, 10) nearest to queries, without their own rows, by all vectors.

    Args:
        members: among which rows of the table to look.
        queries: (queries, dimensions).
    """
    scores: np.ndarray = np.full((len(queries), _NEIGHBOURS), -np.inf, np.float32)
    nearest: np.ndarray = np.full(scores.shape, -1, np.int64)
    for first_row, vectors in _parts(snapshot):
        rows = first_row + np.flatnonzero(members[first_row : first_row + len(vectors)])
        of_part = queries @ vectors[rows - first_row].T
        of_part[own_rows[:, None] == rows] = -np.inf
        scores = np.concatenate([scores, of_part], 1)
        nearest = np.concatenate([nearest, np.broadcast_to(rows, of_part.shape)], 1)
        best = np.argpartition(-scores, _NEIGHBOURS - 1, 1)[:, :_NEIGHBOURS]
        scores, nearest = (np.take_along_axis(values, best, 1) for values in (scores, nearest))
    return nearest


def _search(index: Any, queries: np.ndarray, k: int) -> list[np.ndarray]:
    """Return the k nearest rows for each query; more regions are searched where those searched have fewer rows."""
    import faiss

    k = min(k, index.ntotal)
    nearest = np.empty((len(queries), k), np.int64)
    for start in range(0, len(queries), _QUERIES_AT_ONCE):
        pending = np.arange(start, min(start + _QUERIES_AT_ONCE, len(queries)))
        probes = getattr(index, "nprobe", None)
        while len(pending):
            options = None if probes is None else cast(Any, faiss).SearchParametersIVF(nprobe=probes)
            nearest[pending] = index.search(queries[pending], k, params=options)[1]
            if probes is None or probes == index.nlist:
                break
            pending, probes = pending[(nearest[pending] < 0).any(1)], min(2 * probes, index.nlist)
    return [rows[rows >= 0] for rows in nearest]


def _sample(rows: np.ndarray, count: int) -> np.ndarray:
    """Return some of the rows, in order; the same ones for the same table."""
    return np.sort(np.random.default_rng(0).choice(rows, min(count, len(rows)), replace=False))


def _parts(snapshot: TableSnapshot) -> Iterator[tuple[int, np.ndarray]]:
    """Yield number of the first row and vectors (rows, dimensions) of each part."""
    first_row = 0
    for vectors in snapshot.vectors():
        if len(vectors):
            yield first_row, vectors
        first_row += len(vectors)


def _vectors(snapshot: TableSnapshot, rows: np.ndarray) -> np.ndarray:
    """Return the vectors of rows (rows, dimensions)."""
    chosen = []
    for first_row, vectors in _parts(snapshot):
        in_part = np.flatnonzero((rows >= first_row) & (rows < first_row + len(vectors)))
        chosen.append((in_part, vectors[rows[in_part] - first_row]))
    order = np.concatenate([in_part for in_part, _ in chosen])
    return np.concatenate([vectors for _, vectors in chosen])[np.argsort(order)]


def _leading(vectors: np.ndarray, dim: int) -> np.ndarray:
    return np.ascontiguousarray(normalize(vectors[:, :dim]))
