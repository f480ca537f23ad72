"""Whether a row can be trained on, for tables and streams alike."""

from collections.abc import Callable, Mapping
from typing import Any

from bifocal.data.kinds import COLUMNS
from bifocal.data.normalize import as_list
from bifocal.data.skips import RowError
from bifocal.training.tasks import Task


def usable_row(task: Task, values: Mapping[str, Any], decode: Callable[[Any], Any] | None = None) -> dict[str, Any]:
    """Return a row as the collator takes it: texts as strings or lists of them, images decoded.

    Args:
        values: by column; a `RowError` stands for what could not be read.
        decode: reads an image, or a list of them; images stay as they are when None.

    Raises:
        RowError: if the row cannot be used, and why.
    """
    row = dict(values)
    for column in COLUMNS[task.kind]:
        value = row.get(column)
        if isinstance(value, RowError):
            raise value
        if column == "image":
            row[column] = value if decode is None else decode(value)
        elif column == "negatives":
            row[column] = _negatives(value, task.num_negatives or 1)
        else:
            row[column] = _texts(column, value)
    return row


def _texts(column: str, value: Any) -> str | list[str]:
    value = as_list(value)
    if not isinstance(value, list):
        return _text(column, value)
    if not value:
        raise RowError(f"no {column}", "an empty list")
    return [_text(column, text) for text in value]


def _negatives(value: Any, number: int) -> list[str]:
    value = as_list(value)
    values = value if isinstance(value, list) else [] if value is None else [value]
    if len(values) < number:
        raise RowError("too few negatives", f"{len(values)} of {number}")
    return [_text("negatives", text) for text in values[:number]]


def _text(column: str, value: Any) -> str:
    if not isinstance(value, str):
        raise RowError(f"no {column}", f"{value!r:.40} is not text")
    if not value.strip():
        raise RowError(f"no {column}", "an empty text")
    try:
        value.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which no tokenizer takes
        raise RowError("not UTF-8", f"in {column}: {value[:100]!r}") from None
    return str(value)
