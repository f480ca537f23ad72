"""The items of an index in a LanceDB database, for collections that are too large for one machine's memory.

LanceDB, because its tables are Arrow as ours are, it runs in this process without a server, and the same client works
on object stores (`s3://`, `gs://`) and its cloud (`db://`), where vectors stay on disk.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from bifocal.embedding.items import KINDS, normalize
from bifocal.errors import first_line
from bifocal.hub.search.hits import Hit, SearchError, check_kinds
from bifocal.hub.search.index import SearchIndex
from bifocal.hub.search.ranking import Calibration, sample_rows

_ITEMS = "items"
_CALIBRATION = "calibration"  # the samples of both kinds that make their scores comparable
_MIN_ROWS_FOR_ANN = 50_000  # below, an exact search is fast enough
_REFINE_FACTOR = 10  # candidates per hit that an approximate search scores again with their whole vectors
_DELETE_BATCH_SIZE = 1024


def export_to_lancedb(index: SearchIndex, uri: str) -> int:
    """Write an index's items to a LanceDB database and return its number of rows.

    Existing rows are updated, and rows that the index no longer has are deleted.

    Args:
        uri: a folder, or an address that LanceDB knows.

    Raises:
        SearchError: if the index is empty or damaged, or the database holds items of another model or program.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    snapshot = index.snapshot()
    if not sum(map(len, snapshot.tables)):
        raise SearchError(f"The index '{index.folder}' is empty; add something with bifocal index.")
    text, vector = pa.string(), pa.list_(pa.float32(), index.dimensions)
    schema = pa.schema(
        [("key", text), ("kind", text), ("name", text), ("names", pa.list_(text)), ("text", text),
         ("thumbnail", pa.binary()), ("vector", vector), ("weights", text)]
    )  # fmt: skip
    sampled = sample_rows(np.array(snapshot.rows.column("kind").to_pylist(), dtype=object))
    samples: list[Any] = []
    with _errors_as_search_errors(uri):
        database = _connect(uri)
        if _ITEMS in database.list_tables().tables:
            table = database.open_table(_ITEMS)
            _require_same_weights(table, index.weights, uri)
        else:
            table = database.create_table(_ITEMS, schema=schema)
        keys: set[str] = set()
        first_row = 0
        for rows, vectors in zip(snapshot.tables, snapshot.vectors(), strict=True):
            if not len(rows):
                continue
            names = [[item["name"] for item in items] for items in rows.column("occurrences").to_pylist()]
            columns = {name: rows.column(name) for name in ("key", "kind", "name", "text")}
            columns = {name: column.cast(text).combine_chunks() for name, column in columns.items()}
            columns |= {
                "names": pa.array([list(dict.fromkeys(of_row)) for of_row in names], schema.field("names").type),
                "thumbnail": pc.struct_field(rows.column("image"), "bytes").combine_chunks(),
                "vector": pa.FixedSizeListArray.from_arrays(vectors.ravel(), index.dimensions),
                "weights": pa.array([index.weights] * len(rows), text),
            }
            batch = pa.table({name: columns[name] for name in schema.names}, schema=schema)
            table.merge_insert("key").when_matched_update_all().when_not_matched_insert_all().execute(batch)
            keys |= set(batch["key"].to_pylist())
            for kind_rows in sampled.values():
                in_part = kind_rows[(kind_rows >= first_row) & (kind_rows < first_row + len(rows))] - first_row
                samples.append(batch.select(["kind", "vector"]).take(in_part))
            first_row += len(rows)
        deleted = [key for key in table.search().select(["key"]).to_arrow()["key"].to_pylist() if key not in keys]
        for start in range(0, len(deleted), _DELETE_BATCH_SIZE):
            listed = ", ".join(f"'{key}'" for key in deleted[start : start + _DELETE_BATCH_SIZE])  # hexadecimal
            table.delete(f"key IN ({listed})")
        calibration = pa.schema([("kind", text), ("vector", vector)])
        data = pa.concat_tables([calibration.empty_table(), *samples])
        database.create_table(_CALIBRATION, data=data, schema=calibration, mode="overwrite")
        if table.count_rows() >= _MIN_ROWS_FOR_ANN:
            from lancedb.index import IvfPq

            table.create_index("vector", config=IvfPq(distance_type="dot"), replace=True)
        return int(table.count_rows())


def open_lancedb(uri: str, weights: str) -> Any:
    """Return a database that was exported from an index of these weights.

    Raises:
        SearchError: if there is no such table, or it is of another model.
    """
    with _errors_as_search_errors(uri):
        database = _connect(uri)
        for name in (_ITEMS, _CALIBRATION):
            if name not in database.list_tables().tables:
                raise SearchError(f"There is no table '{name}' at '{uri}'; run bifocal export-lancedb first.")
        _require_same_weights(database.open_table(_ITEMS), weights, uri)
    return database


def search_lancedb(uri: str, vector: np.ndarray, weights: str, k: int = 10, kinds: Sequence[str] = KINDS) -> list[Hit]:
    """Return the k items nearest to a query, ranked as `SearchIndex.search` ranks them.

    From 50,000 rows on the search is approximate: it may miss an item, but scores stay exact.

    Args:
        vector: (dimensions,) of the query.
        weights: hash of the weights of the model that made the query, see `weights_hash`.
        kinds: kinds to search for.

    Raises:
        SearchError: if there is no such table, or it is of another model.
    """
    kinds = check_kinds(kinds)
    query = normalize(np.asarray(vector, np.float32))
    hits: list[Hit] = []
    with _errors_as_search_errors(uri):
        database = open_lancedb(uri, weights)
        table = database.open_table(_ITEMS)
        calibration = _calibration(database.open_table(_CALIBRATION)) if len(kinds) > 1 else Calibration({})
        for kind in kinds:
            search = table.search(query, vector_column_name="vector").distance_type("dot")
            search = search.where(f"kind = '{kind}'", prefilter=True).refine_factor(_REFINE_FACTOR)
            rows = search.limit(k).to_arrow()
            # From the vectors themselves: the distance is 1 - dot product, rounded when it was nearly 1.
            scores = _vectors(rows) @ query
            ranking_scores = calibration.ranking_scores(scores, kind, query)
            hits += [
                Hit(row["name"], kind, row["text"], float(score), float(by), row["thumbnail"], tuple(row["names"]))
                for row, score, by in zip(rows.to_pylist(), scores, ranking_scores, strict=True)
            ]
    return sorted(hits, key=lambda hit: -hit.ranking_score)[:k]


def _calibration(table: Any) -> Calibration:
    rows = table.to_arrow()
    vectors = _vectors(rows)
    kinds = np.array(rows["kind"].to_pylist(), dtype=object)
    return Calibration({kind: vectors[kinds == kind] for kind in KINDS if (kinds == kind).any()})


def _vectors(rows: Any) -> np.ndarray:
    column = rows["vector"]
    flat = column.combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return flat.reshape(len(rows), column.type.list_size)


def _connect(uri: str) -> Any:
    import lancedb

    return lancedb.connect(uri)


@contextmanager
def _errors_as_search_errors(uri: str) -> Iterator[None]:
    """Turn errors of LanceDB and of the stores below it, which are of many kinds, into SearchErrors."""
    try:
        yield
    except SearchError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        reason = first_line(error)[:200]
        raise SearchError(
            f"The database at '{uri}' cannot be used ({reason}). Check address and permissions."
        ) from error


def _require_same_weights(table: Any, weights: str, uri: str) -> None:
    """Check that a table is Bifocal's and was made with these weights.

    Raises:
        SearchError: if the table is of another model, version or program.
    """
    if "names" not in table.schema.names or "weights" not in table.schema.names:
        raise SearchError(
            f"The table '{_ITEMS}' at '{uri}' was written by another version or program. Choose another address."
        )
    rows = table.search().select(["weights"]).limit(1).to_list()
    if rows and rows[0]["weights"] != weights:
        raise SearchError(
            f"The vectors at '{uri}' are of other weights ({rows[0]['weights']}, not {weights}). Choose another "
            "address, or search with --model."
        )
