"""The table of an index in LanceDB, for collections beyond one machine's memory.

LanceDB, since its tables are Arrow as ours are, it runs embedded without a server, and the same client works on object
stores (`s3://`, `gs://`) and its cloud (`db://`), where vectors stay on disk.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from bifocal.hub.search.index import SearchIndex
from bifocal.hub.search.items import KINDS, Hit, SearchError, known_kinds, unit

_TABLE = "items"
_ANN_FROM = 50_000  # rows from which an approximate index pays
_BLOCK = 1024


def copy_to_lance(index: SearchIndex, uri: str) -> int:
    """Copy an index's rows into a LanceDB database; those that are there are replaced, those that are gone deleted.

    Args:
        uri: a folder, or an address that LanceDB knows.

    Returns:
        Rows in the table afterwards.

    Raises:
        SearchError: the index is empty, or the table there is of another model.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    snapshot = index.snapshot()
    if not sum(map(len, snapshot.tables)):
        raise SearchError(f"The index '{index.folder}' is empty; add something with bifocal index.")
    text = pa.string()
    schema = pa.schema(
        [("key", text), ("kind", text), ("name", text), ("names", pa.list_(text)), ("text", text),
         ("thumbnail", pa.binary()), ("vector", pa.list_(pa.float32(), index.dimensions)), ("weights", text)]
    )  # fmt: skip
    with _sentences(uri):
        database = _connect(uri)
        if _TABLE in database.list_tables().tables:
            table = database.open_table(_TABLE)
            _require(table, index.weights, uri)
        else:
            table = database.create_table(_TABLE, schema=schema)
        keys = set()
        for rows, vectors in zip(snapshot.tables, snapshot.vectors(), strict=True):
            if not len(rows):
                continue
            names = [[place["name"] for place in places] for places in rows.column("places").to_pylist()]
            columns = {name: rows.column(name) for name in ("key", "kind", "name", "text")}
            columns = {name: column.cast(text).combine_chunks() for name, column in columns.items()}
            columns |= {
                "names": pa.array([list(dict.fromkeys(one)) for one in names], schema.field("names").type),
                "thumbnail": pc.struct_field(rows.column("image"), "bytes").combine_chunks(),
                "vector": pa.FixedSizeListArray.from_arrays(vectors.ravel(), index.dimensions),
                "weights": pa.array([index.weights] * len(rows), text),
            }
            batch = pa.table({name: columns[name] for name in schema.names}, schema=schema)
            table.merge_insert("key").when_matched_update_all().when_not_matched_insert_all().execute(batch)
            keys |= set(batch["key"].to_pylist())
        gone = [key for key in table.search().select(["key"]).to_arrow()["key"].to_pylist() if key not in keys]
        for start in range(0, len(gone), _BLOCK):
            listed = ", ".join(f"'{key}'" for key in gone[start : start + _BLOCK])  # keys are hexadecimal
            table.delete(f"key IN ({listed})")
        if table.count_rows() >= _ANN_FROM:
            table.create_index(metric="dot", vector_column_name="vector", replace=True)
        return int(table.count_rows())


def search_lance(uri: str, vector: np.ndarray, weights: str, k: int = 10, kinds: Sequence[str] = KINDS) -> list[Hit]:
    """The k nearest items of each kind, each kind a ranking of its own: (pictures first, then texts).

    Args:
        weights: of the model that made the query, see `weights_of`.

    Raises:
        SearchError: there is no such table, or it is of another model.
    """
    with _sentences(uri):
        database = _connect(uri)
        if _TABLE not in database.list_tables().tables:
            raise SearchError(f"There is no table '{_TABLE}' at '{uri}'; copy an index there with bifocal database.")
        table = database.open_table(_TABLE)
        _require(table, weights, uri)
        hits = []
        for kind in known_kinds(kinds):
            query = table.search(unit(np.asarray(vector, np.float32)), vector_column_name="vector").distance_type("dot")
            for row in query.where(f"kind = '{kind}'", prefilter=True).limit(k).to_list():
                score = 1.0 - float(row["_distance"])  # LanceDB's distance of unit vectors is 1 - dot
                names = tuple(row["names"])
                hits.append(Hit(row["name"], kind, row["text"], score, score, row["thumbnail"], names))
        return hits


def _connect(uri: str) -> Any:
    import lancedb

    return lancedb.connect(uri)


@contextmanager
def _sentences(uri: str) -> Iterator[None]:
    """Errors of LanceDB and of the stores below it, which are of many kinds, in one sentence."""
    try:
        yield
    except SearchError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        said = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise SearchError(f"The database at '{uri}' cannot be used ({said}); check address and rights.") from error


def _require(table: Any, weights: str, uri: str) -> None:
    if "names" not in table.schema.names or "weights" not in table.schema.names:
        raise SearchError(
            f"The table '{_TABLE}' at '{uri}' was made by another version or program; choose another place."
        )
    found = table.search().select(["weights"]).limit(1).to_list()
    if found and found[0]["weights"] != weights:
        raise SearchError(
            f"The vectors at '{uri}' were made by other weights ({found[0]['weights']} and not {weights}); choose "
            "another place."
        )
