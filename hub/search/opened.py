"""A table opened for searching. FAISS indexes of its vectors are rebuilt from it if they are damaged."""

import hashlib
import json
import os
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from bifocal.hub.search.items import KINDS, Hit, unit
from bifocal.hub.search.ranking import Calibration, sample_rows
from bifocal.hub.search.table import Snapshot, Table, require_unit


class Opened:
    """What searching needs of a table as it is now; not changed after it is made, so that threads share it.

    Args:
        folder: of the FAISS indexes; where it cannot be written, they are made in memory.
        table: to open.
        forms: dimensions and precision of each.
    """

    def __init__(self, folder: Path, table: Table, forms: Sequence[tuple[int, str]]) -> None:
        snapshot = table.open()
        self.stamp = snapshot.stamp
        # Arrow's own table: a data set takes milliseconds for each row, Arrow microseconds.
        self.arrow: Any = snapshot.rows if snapshot.tables else table.schema.empty_table()
        self.parts, self.first = snapshot.parts, np.cumsum([0, *map(len, snapshot.tables)])
        self.keys: list[str] = self.arrow.column("key").to_pylist()
        self.names: list[str] = self.arrow.column("name").to_pylist()
        self.kinds = np.array(self.arrow.column("kind").to_pylist(), dtype=object)
        self.masks = {kind: np.packbits(self.kinds == kind, bitorder="little") for kind in KINDS}
        self.numbers = {kind: int((self.kinds == kind).sum()) for kind in KINDS}
        self.faiss = {form: _faiss(folder, snapshot, *form) for form in forms} if self.keys else {}
        self.calibration = Calibration({kind: self.vectors(rows) for kind, rows in sample_rows(self.kinds).items()})

    def vectors(self, rows: np.ndarray) -> np.ndarray:
        """(rows, dimensions), the vectors of some rows."""
        column = self.arrow.column("embedding")
        if not len(rows):
            return np.empty((0, column.type.list_size), np.float32)
        found = np.stack([column[int(row)].values.to_numpy() for row in rows])
        for place, row in enumerate(rows):
            require_unit(found[place : place + 1], self.parts[int(np.searchsorted(self.first, row, "right")) - 1])
        return found

    def hit(self, row: int, score: float, standing: float) -> Hit:
        picture = self.arrow.column("image")[row].as_py()
        names = tuple(dict.fromkeys(place["name"] for place in self.arrow.column("places")[row].as_py()))
        shown = None if picture is None else picture["bytes"]
        text = self.arrow.column("text")[row].as_py()
        return Hit(self.names[row], str(self.kinds[row]), text, score, standing, shown, names)


def _faiss(folder: Path, snapshot: Snapshot, dim: int, precision: str) -> Any:
    """The FAISS index of a table as it is: read if there is a whole one, else made and, where possible, kept.

    Its file is named after the table's state, so that no process reads one of another state.
    """
    import faiss

    state = hashlib.blake2b(json.dumps(snapshot.stamp).encode(), digest_size=6).hexdigest()
    path = folder / f"{dim}-{precision}.{state}.faiss"
    count = sum(map(len, snapshot.tables))
    made: Any
    if path.exists():
        # Damaged files raise errors of many kinds, MemoryError among them.
        with suppress(Exception):
            made = faiss.read_index(str(path))
            if (made.ntotal, made.d) == (count, dim) and _is_whole(made, precision):
                return made
    if precision == "float32":
        made = faiss.IndexFlatIP(dim)
    else:
        made = faiss.IndexScalarQuantizer(dim, faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT)
    for vectors in snapshot.vectors():
        short = np.ascontiguousarray(unit(vectors[:, :dim]))
        if not len(short):
            continue
        if not made.is_trained:  # the range of each dimension, by the first part
            made.train(short)
        made.add(short)
    _keep(made, path, f"{dim}-{precision}.")
    return made


def _is_whole(made: Any, precision: str) -> bool:
    import faiss

    if precision != "float32":
        return True
    vectors = faiss.rev_swig_ptr(made.get_xb(), made.ntotal * made.d).reshape(made.ntotal, made.d)
    lengths = np.einsum("nd,nd->n", vectors, vectors)
    return bool((np.abs(lengths - 1.0) < 0.01).all())


def _keep(made: Any, path: Path, form: str) -> None:
    """Write a FAISS index and delete those of the table's earlier states; searching needs no right to write."""
    import faiss

    scratch = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}")
    try:
        path.parent.mkdir(exist_ok=True)
        faiss.write_index(made, str(scratch))
        os.replace(scratch, path)
        for old in path.parent.glob("*.faiss"):
            if old.name.startswith(form) and old != path:
                old.unlink(missing_ok=True)
    except (OSError, RuntimeError, TypeError, ValueError):  # faiss has errors of its own, also for odd paths
        with suppress(OSError):
            scratch.unlink(missing_ok=True)
