"""FAISS indexes of a table's vectors, kept as files and rebuilt from the table if they are damaged."""

import hashlib
import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from bifocal.embedding.items import normalize
from bifocal.hub.search.atomic import replace_file
from bifocal.hub.search.table import TableSnapshot, have_unit_length


def open_faiss_index(folder: Path, snapshot: TableSnapshot, dim: int, precision: str) -> Any:
    """Return the FAISS index of a table: read from its file, or built and, if possible, written to it.

    The file is named after the table's state, so that no process reads the index of another state.

    Args:
        folder: folder of the FAISS indexes.
        dim: leading dimensions of the vectors.
        precision: "float32" or "int8".
    """
    import faiss

    path = folder / f"{dim}-{precision}.{table_state(snapshot)}.faiss"
    count = sum(map(len, snapshot.tables))
    index: Any
    if path.exists():
        # Damaged files raise errors of many kinds, MemoryError among them.
        with suppress(Exception):
            index = faiss.read_index(str(path))
            if (index.ntotal, index.d) == (count, dim) and _is_intact(index, precision):
                return index
    index = new_faiss_index(dim, precision)
    for vectors in snapshot.vectors():
        leading = np.ascontiguousarray(normalize(vectors[:, :dim]))
        if not len(leading):
            continue
        if not index.is_trained:  # the range of each dimension, by the first part
            index.train(leading)
        index.add(leading)
    write_faiss_index(index, path, f"{dim}-{precision}.")
    return index


def table_state(snapshot: TableSnapshot) -> str:
    """Return 12 hexadecimal digits that differ if the table does."""
    return hashlib.blake2b(json.dumps(snapshot.stamp).encode(), digest_size=6).hexdigest()


def new_faiss_index(dim: int, precision: str) -> Any:
    """Return an empty FAISS index that is searched exhaustively."""
    import faiss

    if precision == "float32":
        return faiss.IndexFlatIP(dim)
    return faiss.IndexScalarQuantizer(dim, faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT)


def _is_intact(index: Any, precision: str) -> bool:
    import faiss

    if precision != "float32":
        return True
    return have_unit_length(faiss.rev_swig_ptr(index.get_xb(), index.ntotal * index.d).reshape(index.ntotal, index.d))


def write_faiss_index(index: Any, path: Path, prefix: str) -> None:
    """Write a FAISS index and delete those of earlier states; searching needs no permission to write.

    Args:
        prefix: what the file's name has before the state.
    """
    import faiss

    # FAISS has errors of its own, also for odd paths.
    with suppress(OSError, RuntimeError, TypeError, ValueError):
        path.parent.mkdir(exist_ok=True)
        with replace_file(path) as temporary:
            faiss.write_index(index, str(temporary))
        delete_earlier(path, prefix)


def delete_earlier(path: Path, prefix: str) -> None:
    """Delete the files that have the name of this one, of earlier states of the table."""
    name = re.compile(re.escape(prefix) + r"[0-9a-f]{12}" + re.escape(path.suffix))
    for old in path.parent.glob(f"*{path.suffix}"):
        if name.fullmatch(old.name) and old != path:
            old.unlink(missing_ok=True)
