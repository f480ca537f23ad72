"""The state of an index's table that searches read."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from bifocal.embedding.items import KINDS, normalize
from bifocal.hub.search.faiss_indexes import open_faiss_index
from bifocal.hub.search.hits import Hit
from bifocal.hub.search.ranking import Calibration, sample_rows
from bifocal.hub.search.table import Table, have_unit_length, require_unit_length


class SearchSnapshot:
    """The rows of a table at one moment with their FAISS indexes. It never changes, so that threads share it.

    Args:
        table: to read.
        faiss_folder: folder of the FAISS indexes; if it cannot be written, they are kept in memory only.
        variants: dimensions and precision of each FAISS index.
    """

    def __init__(self, table: Table, faiss_folder: Path, variants: Sequence[tuple[int, str]]) -> None:
        snapshot = table.open()
        self.stamp = snapshot.stamp
        # Arrow's own table: datasets takes milliseconds for each row, Arrow microseconds.
        self.arrow: Any = snapshot.rows if snapshot.tables else table.schema.empty_table()
        self.parts, self.first_rows = snapshot.parts, np.cumsum([0, *map(len, snapshot.tables)])
        self.keys: list[str] = self.arrow.column("key").to_pylist()
        self.names: list[str] = self.arrow.column("name").to_pylist()
        self.kinds = np.array(self.arrow.column("kind").to_pylist(), dtype=object)
        self.masks = {kind: np.packbits(self.kinds == kind, bitorder="little") for kind in KINDS}
        self.counts = {kind: int((self.kinds == kind).sum()) for kind in KINDS}
        # Memory-mapped, as the parts are: each chunk of Arrow's column as one matrix.
        chunks, width = self.arrow.column("embedding").chunks, table.dimensions
        self.chunks = [chunk.flatten().to_numpy(zero_copy_only=False).reshape(len(chunk), width) for chunk in chunks]
        self.first_rows_of_chunks = np.cumsum([0, *map(len, self.chunks)])
        self.width = width
        self.faiss: dict[tuple[int, str], Any] = {}
        if self.keys:
            self.faiss = {variant: open_faiss_index(faiss_folder, snapshot, *variant) for variant in variants}
        self.calibration = Calibration({kind: self.vectors(rows) for kind, rows in sample_rows(self.kinds).items()})

    def rank(
        self, queries: np.ndarray, k: int, kinds: Sequence[str], variant: tuple[int, str], candidates: int
    ) -> "Rankings":
        """Return the k rows nearest to each query, best first.

        Args:
            queries: unit vectors (queries, dimensions).
            k: length of a ranking.
            kinds: kinds of rows, which share one ranking.
            variant: dimensions and precision of the FAISS index to search.
            candidates: rows of each kind that FAISS finds, of which the k best by their whole vectors are kept.
        """
        ranked: list[list[tuple[float, float, int]]] = [[] for _ in queries]
        for kind in kinds:
            nearest = self.nearest_rows(queries, candidates, kind, variant)
            for query, rows, ranking in zip(queries, nearest, ranked, strict=True):
                scores = self.vectors(rows) @ query
                several = len(kinds) > 1
                ranking_scores = self.calibration.ranking_scores(scores, kind, query) if several else scores
                ranking += zip(ranking_scores.tolist(), scores.tolist(), rows.tolist(), strict=True)
        return Rankings(self, [sorted(ranking, key=lambda hit: (-hit[0], hit[2]))[:k] for ranking in ranked])

    def nearest_rows(self, queries: np.ndarray, k: int, kind: str, variant: tuple[int, str]) -> list[np.ndarray]:
        """Return, for each query, the rows of a kind that are nearest to it by one FAISS index, best first.

        Args:
            queries: unit vectors (queries, dimensions).
        """
        import faiss

        k = min(k, self.counts[kind])
        if k == 0:
            return [np.empty(0, np.int64)] * len(queries)
        # FAISS scans for each query on its own then, one per core, so that other queries change no result.
        selector: Any = faiss.IDSelectorBitmap  # its types are those of the C++ below
        options = cast(Any, faiss).SearchParameters(sel=selector(self.masks[kind]))
        _, rows = self.faiss[variant].search(normalize(queries[:, : variant[0]]), k, params=options)
        return [found[found >= 0] for found in rows]

    def vectors(self, rows: np.ndarray) -> np.ndarray:
        """Return the vectors (rows, dimensions) of some rows.

        Raises:
            SearchError: if one is not of length 1, so that its part is damaged.
        """
        vectors = np.empty((len(rows), self.width), np.float32)
        numbers = np.searchsorted(self.first_rows_of_chunks, rows, "right") - 1
        for position, (number, row) in enumerate(zip(numbers.tolist(), rows.tolist(), strict=True)):
            vectors[position] = self.chunks[number][row - self.first_rows_of_chunks[number]]
        if not have_unit_length(vectors):
            for position, row in enumerate(rows):
                part = self.parts[int(np.searchsorted(self.first_rows, row, "right")) - 1]
                require_unit_length(vectors[position : position + 1], part)
        return vectors

    def hit(self, row: int, score: float, ranking_score: float) -> Hit:
        image = self.arrow.column("image")[row].as_py()
        names = tuple(dict.fromkeys(occurrence["name"] for occurrence in self.arrow.column("occurrences")[row].as_py()))
        thumbnail = None if image is None else image["bytes"]
        text = self.arrow.column("text")[row].as_py()
        return Hit(self.names[row], str(self.kinds[row]), text, score, ranking_score, thumbnail, names)


@dataclass
class Rankings:
    """What several queries found, all in the same snapshot.

    Args:
        snapshot: the rows that were searched.
        rows: ranking score, score and row of each hit, best first, of each query.
    """

    snapshot: SearchSnapshot
    rows: list[list[tuple[float, float, int]]]

    def hits(self, query: int) -> list[Hit]:
        """Return the hits of a query, with their texts and thumbnails, which are read only now."""
        return [self.snapshot.hit(row, score, ranking_score) for ranking_score, score, row in self.rows[query]]
