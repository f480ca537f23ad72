"""The table of an index in LanceDB, for collections beyond one machine's memory.

LanceDB, since its tables are Arrow as ours are, it runs embedded without a server, and the same client works on object
stores (`s3://`, `gs://`) and its cloud (`db://`), where vectors stay on disk.
"""

from collections.abc import Sequence
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
    import lancedb
    import pyarrow as pa

    rows = index.table.open()
    if rows is None:
        raise SearchError(f"The index '{index.folder}' is empty; add something with bifocal index.")
    schema = pa.schema(
        [("key", pa.string()), ("kind", pa.string()), ("name", pa.string()), ("text", pa.string()),
         ("thumbnail", pa.binary()), ("vector", pa.list_(pa.float32(), index.dimensions)), ("weights", pa.string())]
    )  # fmt: skip
    database = lancedb.connect(uri)
    if _TABLE in database.list_tables().tables:
        table = database.open_table(_TABLE)
        _require(table, index.weights, uri)
    else:
        table = database.create_table(_TABLE, schema=schema)
    from datasets import Image

    rows = rows.cast_column("image", Image(decode=False)).with_format("numpy", ["embedding"], output_all_columns=True)
    for start in range(0, len(rows), _BLOCK):
        block = rows[start : start + _BLOCK]
        count = len(block["key"])
        batch = pa.table(
            {"key": block["key"], "kind": block["kind"], "name": block["name"], "text": block["text"],
             "thumbnail": [None if picture is None else picture["bytes"] for picture in block["image"]],
             "vector": pa.FixedSizeListArray.from_arrays(np.asarray(block["embedding"]).ravel(), index.dimensions),
             "weights": [index.weights] * count},
            schema=schema,
        )  # fmt: skip
        table.merge_insert("key").when_matched_update_all().when_not_matched_insert_all().execute(batch)
    keys = set(rows["key"])
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
    import lancedb

    database = lancedb.connect(uri)
    if _TABLE not in database.list_tables().tables:
        raise SearchError(f"There is no table '{_TABLE}' at '{uri}'; copy an index there with bifocal database.")
    table = database.open_table(_TABLE)
    _require(table, weights, uri)
    hits = []
    for kind in known_kinds(kinds):
        query = table.search(unit(np.asarray(vector, np.float32)), vector_column_name="vector").distance_type("dot")
        found = query.where(f"kind = '{kind}'", prefilter=True).limit(k).to_list()
        for row in found:
            score = 1.0 - float(row["_distance"])  # LanceDB's distance of unit vectors is 1 - dot
            hits.append(Hit(row["name"], kind, row["text"], score, score, row["thumbnail"]))
    return hits


def _require(table: Any, weights: str, uri: str) -> None:
    found = table.search().select(["weights"]).limit(1).to_list()
    if found and found[0]["weights"] != weights:
        raise SearchError(
            f"The vectors at '{uri}' were made by other weights ({found[0]['weights']} and not {weights}); choose "
            "another place."
        )
