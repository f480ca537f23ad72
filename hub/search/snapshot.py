"""The state of an index's table that searches read."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from bifocal.hub.search.faiss_indexes import open_faiss_index
from bifocal.hub.search.items import KINDS, Hit, normalize
from bifocal.hub.search.ranking import Calibration, sample_rows
from bifocal.hub.search.table import Table, require_unit_length


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
        self.faiss: dict[tuple[int, str], Any] = {}
        if self.keys:
            self.faiss = {variant: open_faiss_index(faiss_folder, snapshot, *variant) for variant in variants}
        self.calibration = Calibration({kind: self.vectors(rows) for kind, rows in sample_rows(self.kinds).items()})

    def nearest_rows(self, query: np.ndarray, k: int, kind: str, variant: tuple[int, str]) -> np.ndarray:
        """Return the rows of a kind that are nearest to a query by one FAISS index, best first.

        Args:
            query: unit vector (dimensions,).
        """
        import faiss

        k = min(k, self.counts[kind])
        if k == 0:
            return np.empty(0, np.int64)
        selector: Any = faiss.IDSelectorBitmap  # its types are those of the C++ below
        options = cast(Any, faiss).SearchParameters(sel=selector(self.masks[kind]))
        _, rows = self.faiss[variant].search(normalize(query[: variant[0]])[None], k, params=options)
        return rows[0][rows[0] >= 0]

    def vectors(self, rows: np.ndarray) -> np.ndarray:
        """Return the vectors (rows, dimensions) of some rows.

        Raises:
            SearchError: if one is not of length 1, so that its part is damaged.
        """
        column = self.arrow.column("embedding")
        if not len(rows):
            return np.empty((0, column.type.list_size), np.float32)
        vectors = np.stack([column[int(row)].values.to_numpy() for row in rows])
        for number, row in enumerate(rows):
            part = self.parts[int(np.searchsorted(self.first_rows, row, "right")) - 1]
            require_unit_length(vectors[number : number + 1], part)
        return vectors

    def hit(self, row: int, score: float, ranking_score: float) -> Hit:
        image = self.arrow.column("image")[row].as_py()
        names = tuple(dict.fromkeys(occurrence["name"] for occurrence in self.arrow.column("occurrences")[row].as_py()))
        thumbnail = None if image is None else image["bytes"]
        text = self.arrow.column("text")[row].as_py()
        return Hit(self.names[row], str(self.kinds[row]), text, score, ranking_score, thumbnail, names)
