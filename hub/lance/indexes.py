"""The indexes of a table in LanceDB, and the sample that makes scores of images and texts comparable."""

from typing import TYPE_CHECKING, Any

import numpy as np

from bifocal.embedding.items import KINDS
from bifocal.hub.lance.database import CALIBRATION, table_names
from bifocal.hub.search.ranking import SAMPLE_SIZE, Calibration, sample_rows

if TYPE_CHECKING:
    import pyarrow as pa

DISTANCE = "cosine"
WORDS = ("text", "names")  # columns of the full-text indexes
MIN_ROWS_FOR_ANN = 50_000  # below, an exact search is fast enough
_ROWS_TO_SAMPLE_FROM = 65_536
_RANDOM_SEED = 0


def build_indexes(database: Any, table: Any) -> str:
    """Build the indexes of a table, or add new rows to them, and return what there is, in words.

    Vectors have an IVF-PQ index from 50,000 rows on: LanceDB's default, and small enough for an object store. It is
    trained again when the table has more than doubled. Words have full-text indexes; kinds and names scalar ones.

    Args:
        database: connection to the database of the table.
        table: open table of items.
    """
    from lancedb.index import FTS, Bitmap, BTree, IvfPq

    table.checkout_latest()
    count = table.count_rows()
    existing = {column for index in table.list_indices() for column in index.columns}
    # Words of all languages: segmented as Unicode says, without the stems and stop words of one language.
    words = FTS(base_tokenizer="icu/split", stem=False, remove_stop_words=False)
    wanted = {
        "kind": Bitmap(), "is_caption": Bitmap(), "is_text": Bitmap(), "name": BTree(), **dict.fromkeys(WORDS, words),
    }  # fmt: skip
    for column, config in wanted.items():
        if column not in existing:
            table.create_index(column, config=config)
    has_vector_index = count >= MIN_ROWS_FOR_ANN
    if has_vector_index:
        trained = table.index_stats("vector_idx") if "vector" in existing else None
        if trained is None or trained.num_unindexed_rows > trained.num_indexed_rows:
            table.create_index("vector", config=IvfPq(distance_type=DISTANCE), replace=True)
    # Merges small files, and adds rows that came after an index was built to it. Versions that are younger than a week
    # stay: others may read them.
    table.optimize()
    _write_sample(database, table)
    how = "with an IVF-PQ index" if has_vector_index else "few enough for exact search"
    return f"{count:,} rows, vectors {how}, full-text indexes of texts and names"


def sample(table: Any) -> Any:
    """Return kinds and vectors of the sample of a table, see `sample_rows`, as an Arrow table."""
    import pyarrow as pa

    count = table.count_rows()
    generator = np.random.default_rng(_RANDOM_SEED)
    offsets = np.arange(count)
    if count > _ROWS_TO_SAMPLE_FROM:
        offsets = np.sort(generator.choice(count, _ROWS_TO_SAMPLE_FROM, replace=False))
    samples = [_sample_schema(table).empty_table()]
    if not count:
        return samples[0]
    kinds = table.take_offsets(offsets.tolist()).select(["kind"]).to_arrow()["kind"]
    chosen = sample_rows(np.array(kinds.to_pylist(), dtype=object))
    for kind in KINDS:
        rows = offsets[chosen.get(kind, np.empty(0, np.int64))]
        query = table.take_offsets(rows.tolist())
        if len(offsets) < count and len(rows) < SAMPLE_SIZE:  # a rare kind
            of_kind = table.search().where(f"kind = '{kind}'").select(["kind"]).with_row_id(True).to_arrow()
            rows = of_kind["_rowid"].to_numpy()
            rows = generator.choice(rows, min(SAMPLE_SIZE, len(rows)), replace=False)
            query = table.take_row_ids(rows.tolist())
        if len(rows):
            samples.append(query.select(["kind", "vector"]).to_arrow())
    return pa.concat_tables(samples)


def _sample_schema(table: Any) -> "pa.Schema":
    import pyarrow as pa

    return pa.schema([table.schema.field(name) for name in ("kind", "vector")])


def _write_sample(database: Any, table: Any) -> None:
    schema = _sample_schema(table).with_metadata(table.schema.metadata)
    rows = sample(table).replace_schema_metadata(table.schema.metadata)
    mode = "overwrite" if CALIBRATION in table_names(database) else "create"
    database.create_table(CALIBRATION, data=rows, schema=schema, mode=mode)


def calibration_of(sample: Any) -> Calibration:
    """Return the calibration that a sample stands for."""
    vectors = vectors_of(sample)
    kinds = np.array(sample["kind"].to_pylist(), dtype=object)
    return Calibration({kind: vectors[kinds == kind] for kind in KINDS if (kinds == kind).any()})


def vectors_of(rows: Any) -> np.ndarray:
    """Return the vectors (rows, dimensions) of an Arrow table, in float32."""
    column = rows["vector"]
    flat = column.combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return flat.astype(np.float32).reshape(len(rows), column.type.list_size)
