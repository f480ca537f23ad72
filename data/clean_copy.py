"""Write a filtered copy of a source as Parquet files, which can then be streamed."""

import os
import tempfile
from pathlib import Path

from bifocal.data.filters import Cleaning
from bifocal.data.loading import load_source
from bifocal.data.skips import SkipLog, start_log
from bifocal.data.source import Source
from bifocal.errors import DataError

_ROWS = 10_000  # rows per file
_GROUP = 256  # rows held in memory, images included


def write_clean(source: Source, kind: str, out: Path, skipped: SkipLog) -> int:
    """Write the good rows that pass the source's filters, images included, and return their number.

    The log of skipped rows is overwritten.

    Raises:
        DataError: if the folder holds other files; they and the log are left as they are.
        NotOursError: if the path of the log has another file.
        BadRowsError: if more rows are bad than the source's `max_bad_fraction` allows.
        OSError: if the folder cannot be written.
    """
    others = [path.name for path in sorted(out.iterdir()) if path.name != "skipped.jsonl"] if out.exists() else []
    if others:
        raise DataError(f"'{out}' is not empty (it has {others[0]}). Choose another folder or empty this one.")
    if skipped.log is not None:
        start_log(skipped.log)

    # Not before the folder is checked: it takes a second.
    from datasets.table import embed_table_storage
    from pyarrow.parquet import ParquetWriter

    cleaning = (source.clean or Cleaning()).model_copy(update={"verify_images": True})
    source = source.model_copy(update={"streaming": False, "clean": cleaning})
    data = load_source(source, kind, 0, skipped, source.title)
    files = max(1, -(-len(data) // _ROWS))
    out.mkdir(parents=True, exist_ok=True)
    # Files appear where a source finds them only when all are complete.
    with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=out) as scratch:
        for number in range(files):
            part = data.shard(files, number, contiguous=True).with_format("arrow")
            name = f"{number:05}-of-{files:05}.parquet"
            with ParquetWriter(Path(scratch, name), part.features.arrow_schema) as writer:
                for rows in part.iter(_GROUP):
                    writer.write_table(embed_table_storage(rows))  # images into the file, where rows name paths
        for path in sorted(Path(scratch).glob("*.parquet")):
            os.replace(path, out / path.name)
    return len(data)
