"""Names of rows in logs and errors: the file and number that a row was read from."""

from collections.abc import Iterator, Sequence
from typing import Any

ROW = "_row"  # column of the cache with the names


class RowNames:
    """The names of the rows of a data set.

    Args:
        source: a `datasets.Dataset` with the column `ROW`, or a title that comes before the row's number.
        rows: numbers of the rows in the source.
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
    """Attach row names to a `datasets.Dataset` and return it; results of `map` or `shuffle` lose them."""
    dataset.row_names = names
    return dataset


def row_name(dataset: Any, row: Any) -> str:
    """Return the name of a row, such as `pairs.csv:17`; its number if the data set has no names.

    Args:
        row: number of the row, or its name from a stream.
    """
    names = getattr(dataset, "row_names", None)
    if names is None or not isinstance(row, int) or len(names) != len(dataset):
        return str(row)
    return str(names[row])


def select_rows(dataset: Any, rows: Sequence[int]) -> Any:
    """Return some rows of a `datasets.Dataset` with their names."""
    names = getattr(dataset, "row_names", None)
    selected = dataset.select(rows)
    if names is None:
        return selected
    return with_row_names(selected, RowNames(names.source, [names.rows[int(row)] for row in rows]))


def rows_of(dataset: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the rows of a `datasets.Dataset` with their names, images as bytes or paths."""
    for number, row in enumerate(dataset):
        yield row_name(dataset, number), with_plain_image(row)


def with_plain_image(row: dict[str, Any]) -> dict[str, Any]:
    """Replace the image of a row, as `datasets` has it, by its bytes or path, and return the row."""
    image = row.get("image")
    if isinstance(image, dict):
        row["image"] = image["bytes"] if image["bytes"] is not None else image["path"]
    return row
