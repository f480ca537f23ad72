"""By which names a log or an error lets one find a row of a data set that was read from files."""

from collections.abc import Sequence
from typing import Any

ROW = "_row"  # a column with the names, in the cache


class RowNames:
    """The names of the rows of a data set.

    Args:
        source: a `datasets.Dataset` with the column `ROW`, or a title that is followed by the number of the row.
        rows: which rows of the source these are.
    """

    def __init__(self, source: Any, rows: Sequence[int]) -> None:
        self.source = source
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> str:
        row = int(self.rows[number])
        return f"{self.source}:{row}" if isinstance(self.source, str) else self.source[row][ROW]


def with_row_names(dataset: Any, names: RowNames) -> Any:
    """Return a `datasets.Dataset` that knows the names of its rows; what `map` or `shuffle` makes of it does not."""
    dataset.row_names = names
    return dataset


def row_name(dataset: Any, row: Any) -> str:
    """Return the name of a row: file and number where they are known, such as `pairs.csv:17`, or else its number.

    Args:
        row: its number, or the name that a stream has given it.
    """
    names = getattr(dataset, "row_names", None)
    if names is None or not isinstance(row, int) or len(names) != len(dataset):
        return str(row)
    return str(names[row])


def select_rows(dataset: Any, rows: Sequence[int]) -> Any:
    """Return some rows of a `datasets.Dataset`, their names kept."""
    names = getattr(dataset, "row_names", None)
    selected = dataset.select(rows)
    if names is None:
        return selected
    return with_row_names(selected, RowNames(names.source, [names.rows[int(row)] for row in rows]))
