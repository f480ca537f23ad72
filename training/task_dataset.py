"""Makes the data sets that users pass readable row by row or as a stream."""

import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np

from bifocal.data.image_decoding import disable_image_decoding
from bifocal.data.kinds import COLUMNS
from bifocal.data.shards import ShardStream
from bifocal.data.skips import RowError
from bifocal.errors import TrainingError

logger = logging.getLogger(__name__)
_PEEKED = 64  # rows that are read to know the columns, or the number of negatives, where no table tells them
_ACCEPTED = "a datasets.Dataset or IterableDataset, a list of dicts, a pandas DataFrame or a torch Dataset of dicts"


def is_missing(value: Any) -> bool:
    """Return whether a value is missing: None, or the NaN, NaT or NA of pandas."""
    if isinstance(value, float | np.floating):
        return bool(value != value)
    return value is None or type(value).__name__ in ("NAType", "NaTType")


class RowsByNumber:
    """Dicts that any object with a length gives by number, read one by one when they are needed.

    Args:
        source: a torch `Dataset`, a list of dicts or a pandas DataFrame.
        columns: those that the task uses.
    """

    def __init__(self, source: Any, columns: Sequence[str]) -> None:
        self.source = source
        self.column_names = list(columns)

    def __len__(self) -> int:
        return len(self.source)

    def row(self, number: int) -> dict[str, Any]:
        """Return a row, with None for each missing value."""
        row = self.source.iloc[number].to_dict() if hasattr(self.source, "iloc") else self.source[number]
        if not isinstance(row, Mapping):
            raise TypeError(f"the row is of type {type(row).__name__} and not a dict")
        return {name: None if is_missing(value) else value for name, value in row.items()}

    def __getitem__(self, rows: Any) -> dict[str, Any]:
        """Return a row as a dict, or the columns of a list of rows."""
        if isinstance(rows, int):
            return self.row(rows)
        all_rows = [self.row(number) for number in rows]
        return {name: [row.get(name) for row in all_rows] for name in self.column_names}


def task_data(dataset: Any, name: str, kind: str) -> Any:
    """Return a data set in which rows are read by number or as a stream, images undecoded and values plain.

    Nothing is copied. A format (`with_format("numpy")`, "torch", "pandas", ...) is dropped, since it only changes how
    values are shown; a transform (`with_transform`) is kept.

    Args:
        dataset: what a user gave a `Task`.
        name, kind: the task's name and kind.

    Returns:
        A `datasets.Dataset`, a `datasets.IterableDataset`, a `ShardStream` or `RowsByNumber`.

    Raises:
        TrainingError: if it cannot be read by number or as a stream, or has no rows.
    """
    import datasets

    if isinstance(dataset, ShardStream | RowsByNumber):
        data = dataset
    elif isinstance(dataset, datasets.Dataset):
        is_transformed = dataset.format["type"] == "custom"
        plain = dataset if dataset.format["type"] in (None, "custom") else dataset.with_format(None)
        data = plain if is_transformed else disable_image_decoding(plain)
    elif isinstance(dataset, datasets.IterableDataset):
        data = disable_image_decoding(dataset.with_format(None) if dataset._formatting is not None else dataset)
    else:
        data = _rows_by_number(dataset, name, kind)
    if hasattr(data, "__len__") and not len(data):
        raise TrainingError(f"The data set of task '{name}' has no rows.")
    return data


def _rows_by_number(dataset: Any, name: str, kind: str) -> RowsByNumber:
    wanted = [*COLUMNS[kind], "image_id"]
    problem = None
    if isinstance(dataset, str | os.PathLike):
        problem = f"is the path '{dataset}'; load it with load_source('{dataset}', '{kind}')"
    elif isinstance(dataset, Mapping):
        shown = ", ".join(map(str, list(dataset)[:6]))
        if any(hasattr(value, "column_names") for value in dataset.values()):
            problem = f"holds several splits ({shown}); give one of them"
        else:
            problem = f"is a {type(dataset).__name__} of {shown}; make one with datasets.Dataset.from_dict"
    elif isinstance(dataset, Iterator):
        problem = "can be read only once; give the function that makes it to datasets.IterableDataset.from_generator"
    elif type(dataset).__module__.startswith("polars"):
        problem = "is a polars frame; make one with datasets.Dataset.from_polars"
    elif not hasattr(dataset, "__getitem__") or not _has_length(dataset):
        problem = f"is of type {type(dataset).__name__}, which has no rows by number; give {_ACCEPTED}"
    if problem:
        raise TrainingError(f"The data set of task '{name}' {problem}.")
    rows = RowsByNumber(dataset, wanted)
    first, error = _first_row(rows)
    if first is None and error is not None:
        raise TrainingError(
            f"The rows of the data set of task '{name}' cannot be read ({_line(error)}); give dicts with "
            f"{', '.join(COLUMNS[kind])}."
        ) from error
    if first is not None:
        names = list(map(str, dataset.columns)) if hasattr(dataset, "iloc") else list(first)
        if set(COLUMNS[kind]) <= set(names) and kind == "image-text":
            names.append("image_id")  # later rows may have one if the first has none
        rows.column_names = [column for column in wanted if column in names] or names
    return rows


def _has_length(dataset: Any) -> bool:
    try:
        return len(dataset) >= 0
    except (TypeError, NotImplementedError):
        return False


def _first_row(rows: RowsByNumber) -> tuple[dict[str, Any] | None, Exception | None]:
    """Return the first row that can be read, or the error of the first one if none can."""
    problem = None
    for number in range(min(len(rows), _PEEKED)):
        try:
            return rows.row(number), None
        except Exception as error:  # whatever the code of a user raises
            problem = problem or error
    return None, problem


def read_rows(dataset: Any, rows: Sequence[int]) -> dict[str, list[Any]]:
    """Return the columns of some rows; a row that cannot be read has a `RowError` in each."""
    try:
        return dict(dataset[list(rows)])
    except Exception:  # a transform, a user's own class, or a disk: find out which rows it is
        all_rows = [_read_alone(dataset, row) for row in rows]
    names = next((list(row) for row in all_rows if not isinstance(row, RowError)), list(dataset.column_names))
    return {name: [row if isinstance(row, RowError) else row.get(name) for row in all_rows] for name in names}


def _read_alone(dataset: Any, row: int) -> dict[str, Any] | RowError:
    try:
        return {name: values[0] for name, values in dataset[[row]].items()}
    except Exception as error:
        return RowError("row cannot be read", _line(error))


def _line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def column_names(dataset: Any) -> list[str] | None:
    """Return the columns of what `task_data` returned; None for a stream that does not know them before it is read."""
    if getattr(dataset, "format", {}).get("type") != "custom" or not len(dataset):
        return dataset.column_names
    names = list(read_rows(dataset, range(min(len(dataset), _PEEKED))))  # what the transform makes of them
    return names or dataset.column_names


def choose_negatives(dataset: Any, name: str, wanted: int | None, max_bad_fraction: float) -> int:
    """Return how many hard negatives of each row a task uses: `wanted`, or as many as nearly all rows have.

    In a table all lengths are counted. In other data sets the first rows are read, and the most frequent number counts.

    Raises:
        TrainingError: if no row has negatives, or too many rows of a table have fewer than `wanted`.
    """
    lengths, whole = _numbers_of_negatives(dataset)
    total = lengths.total()
    if not total or not max(lengths):
        raise TrainingError(f"Task '{name}' has no negatives in its rows; use the kind text-pair, or mine some.")
    known = sorted(length for length in lengths if length)
    if not whole:
        return wanted or max(known, key=lambda length: lengths[length])

    def fewer_than(number: int) -> int:
        return sum(count for length, count in lengths.items() if length < number)

    affordable = max((n for n in known if fewer_than(n) <= max_bad_fraction * total), default=known[0])
    number = affordable if wanted is None else wanted
    fewer, more = fewer_than(number), sum(count for length, count in lengths.items() if length > number)
    if fewer > max_bad_fraction * total:
        lower = (
            f"Set num_negatives={affordable}" if fewer_than(affordable) <= max_bad_fraction * total else "Remove them"
        )
        raise TrainingError(
            f"Task '{name}': {fewer:,} of {total:,} rows have fewer than {number} negatives, more than "
            f"max_bad_fraction={max_bad_fraction:g} allows. {lower}, or raise max_bad_fraction to skip those rows."
        )
    if (fewer or (more and wanted is None)) and os.environ.get("RANK", "0") == "0":
        logger.warning(
            f"Task '{name}' uses {number} negatives of each row: of {total:,} rows {fewer:,} have fewer and are "
            f"skipped, {more:,} have more, and the first ones are used. Set num_negatives for another number."
        )
    return number


def _numbers_of_negatives(dataset: Any) -> tuple[Counter[int], bool]:
    """Return how many rows have how many negatives, and whether these are all rows."""
    import pyarrow as pa
    import pyarrow.compute as pc

    table = getattr(dataset, "data", None)
    if table is not None and hasattr(dataset, "_indices") and dataset.format["type"] != "custom":
        column = table.column("negatives")
        if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
            lengths = pc.list_value_length(column)
            lengths = lengths if dataset._indices is None else lengths.take(dataset._indices.column(0))
            counts = pc.value_counts(pc.fill_null(lengths, 0)).to_pylist()
            return Counter({entry["values"]: entry["counts"] for entry in counts}), True
    if hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__"):
        values: list[Any] = read_rows(dataset, range(min(len(dataset), _PEEKED))).get("negatives", [])
    else:
        values = [row.get("negatives") for row in islice(dataset, _PEEKED)]
    lists = [value if hasattr(value, "__len__") and not isinstance(value, str) else () for value in values]
    return Counter(map(len, lists)), False
