"""FAISS indexes of a table's vectors, kept as files and rebuilt from the table if they are damaged."""

import hashlib
import json
import logging
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from bifocal.embedding.items import normalize
from bifocal.hub.search.atomic import replace_file
from bifocal.hub.search.settings import Variant
from bifocal.hub.search.table import TableSnapshot, have_unit_length

logger = logging.getLogger(__name__)

# Of writing an index: FAISS has errors of its own, also for odd paths. Searching needs no permission to write.
WRITE_ERRORS = (OSError, RuntimeError, TypeError, ValueError)


def open_faiss_index(folder: Path, snapshot: TableSnapshot, variant: Variant) -> Any:
    """Return the FAISS index of a table: read from its file, or built and, if possible, written to it.

    The file is named after the table's state, so that no process reads the index of another state.

    Args:
        folder: folder of the FAISS indexes.
        variant: dimensions and precision.
    """
    import faiss

    dim, precision = variant.dim, variant.precision
    path = folder / f"{variant.file_name}.{table_state(snapshot)}.faiss"
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
    with suppress(*WRITE_ERRORS):
        write_faiss_index(index, path)
        delete_earlier(folder, variant.file_name, table_state(snapshot))
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


def write_faiss_index(index: Any, path: Path) -> None:
    """Write a FAISS index, whole or not at all; it raises one of `WRITE_ERRORS`."""
    import faiss

    path.parent.mkdir(exist_ok=True)
    with replace_file(path) as temporary:
        faiss.write_index(index, str(temporary))


def delete_earlier(folder: Path, name: str, state: str | None) -> None:
    """Delete the FAISS indexes of a variant that were made of earlier states of the table, with vectors since removed.

    Args:
        folder: folder of the FAISS indexes.
        name: see `Variant.file_name`.
        state: state whose files are kept; None to keep those of no state.
    """
    # An approximate variant has a file for each group, also for groups that have no rows any more.
    of_variant = re.compile(re.escape(name) + r"(?:-(?!approximate)[a-z-]+)?\.([0-9a-f]{12})\.(?:faiss|json)")
    for path in sorted(folder.glob(f"{name}*")):
        match = of_variant.fullmatch(path.name)
        if match and match[1] != state:
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                logger.warning(f"'{path}' holds vectors of an earlier state and cannot be deleted ({error.strerror}).")
