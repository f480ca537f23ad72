"""Reads the rows of one file from a position on; a `RowError` stands for each broken row.

The readers of `datasets`, which read data sets of the Hub, stop at the first broken row or silently skip rows.
"""

from collections.abc import Iterator
from functools import partial
from itertools import islice
from typing import Any

from bifocal.data.delimited import read_csv
from bifocal.data.image_files import find_images, image_suffixes
from bifocal.data.labels import schema_class_names, with_class_names
from bifocal.data.paths import GZIP, open_file
from bifocal.data.skips import RowError
from bifocal.data.text_files import Reader, Row, file_error, file_name, read_json, read_json_lines

IMAGE_SUFFIXES = image_suffixes()


def read_parquet(path: str, start: Any = None, labels: bool = True) -> Iterator[Row]:
    """Yield the rows of a Parquet file; a position is a number of rows.

    Args:
        labels: replace class numbers with their names, if the file has them.
    """
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile

    number = start or 0
    with open_file(path) as file:
        try:
            parquet = ParquetFile(file)
            first = group = 0
            groups = parquet.metadata.num_row_groups
            while group < groups and first + parquet.metadata.row_group(group).num_rows <= number:
                first, group = first + parquet.metadata.row_group(group).num_rows, group + 1
            batches = parquet.iter_batches(256, row_groups=range(group, groups)) if group < groups else ()
            names = schema_class_names(parquet.schema_arrow) if labels else {}
            for value in islice(_arrow_rows(batches, names), number - first, None):
                number += 1
                yield Row(number, f"{file_name(path)}:{number}", value)
        except (pa.ArrowException, OSError, EOFError) as error:
            yield Row(None, f"{file_name(path)}:{number + 1}", file_error(error))


def read_arrow(path: str, start: Any = None, labels: bool = True) -> Iterator[Row]:
    """Yield the rows of an Arrow stream (which `datasets` writes) or file; a position is a number of rows.

    Args:
        labels: as in `read_parquet`.
    """
    import pyarrow as pa

    number = start or 0
    with open_file(path) as file:
        try:
            try:
                batches: Any = pa.ipc.open_stream(file)
                schema = batches.schema
            except pa.ArrowInvalid:
                file.seek(0)
                whole = pa.ipc.open_file(file)
                schema = whole.schema
                batches = (whole.get_batch(n) for n in range(whole.num_record_batches))
            names = schema_class_names(schema) if labels else {}
            for value in islice(_arrow_rows(batches, names), number, None):
                number += 1
                yield Row(number, f"{file_name(path)}:{number}", value)
        except (pa.ArrowException, OSError, EOFError) as error:
            yield Row(None, f"{file_name(path)}:{number + 1}", file_error(error))


def _arrow_rows(batches: Any, names: dict[str, list[str]]) -> Iterator[Any]:
    for batch in batches:
        for start in range(0, batch.num_rows, 256):
            try:
                values = batch.slice(start, 256).to_pylist()
            except UnicodeDecodeError:  # a string column with bytes that are not UTF-8: row by row
                values = [_arrow_row(batch, row) for row in range(start, min(start + 256, batch.num_rows))]
            if not names:
                yield from values
                continue
            yield from (row if isinstance(row, RowError) else with_class_names(row, names) for row in values)


def _arrow_row(batch: Any, row: int) -> Any:
    try:
        return batch.slice(row, 1).to_pylist()[0]
    except UnicodeDecodeError as error:
        return RowError("not UTF-8", str(error)[:200])


def read_image_folder(folder: str, start: Any = None) -> Iterator[Row]:
    """Yield every image of a folder and its subfolders, by name; a position is a number of rows."""
    for number, name in islice(enumerate(find_images(folder).names, 1), start or 0, None):
        yield Row(number, name, {"image": name})


READERS: dict[str, Reader] = {
    "jsonl": read_json_lines, "json": read_json, "csv": read_csv, "tsv": partial(read_csv, tabs=True),
    "parquet": read_parquet, "arrow": read_arrow,
}  # fmt: skip


def format_of(path: str) -> str | None:
    """Return the format of a file by its name; None if it is unknown."""
    name = path.partition("?")[0].lower()
    for ending in GZIP:
        name = name.removesuffix(ending)
    ending = name.rpartition(".")[2]
    if ending == "tar" or path.lower().endswith(".tgz"):
        return "webdataset"
    return ending if ending in READERS else None
