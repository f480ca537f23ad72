"""Classes of labelled images: their names and the number of each row's class."""

from collections.abc import Mapping, Sequence
from typing import Any

from bifocal.data.skips import RowError
from bifocal.errors import EvaluationError
from bifocal.evaluation.rows import Rows, as_sequence


def class_names(task: str, labels: Any, classes: Sequence[str] | None) -> list[str]:
    """Return the names of the classes: `classes`, those of a `ClassLabel` column, or the labels if they are names.

    Args:
        task: name of the data set.
        labels: label of each row.
        classes: names by number; None to infer them from the labels.

    Raises:
        EvaluationError: if the classes have no names, or numbers as names, which make no prompts.
    """
    if classes is None:
        source, column = getattr(labels, "source", None), getattr(labels, "column_name", None)
        feature = getattr(source, "features", None)
        in_schema = getattr(feature.get(column), "names", None) if isinstance(feature, Mapping) else None
        classes = in_schema or sorted({label.strip() for label in labels if isinstance(label, str) and label.strip()})
        if not classes:
            raise EvaluationError(
                f"The labels of '{task}' are numbers without names; give classes, such as dataset.features"
                "['label'].names."
            )
    names = [str(name) for name in as_sequence(task, "classes", classes)]
    numbers = [name for name in names if name.strip().lstrip("+-").isdigit()]
    if numbers:
        raise EvaluationError(
            f"The classes of '{task}' are named by numbers ({', '.join(numbers[:4])}), which make no prompts; give "
            "their names under classes, digits in words."
        )
    return names


def class_numbers(rows: Rows, classes: Sequence[str]) -> dict[int, int]:
    """Return the number of each row's class; rows without a label are skipped.

    Args:
        rows: the rows, with a column `labels`.
        classes: names of the classes by number.

    Raises:
        EvaluationError: if a label is not one of the classes.
    """
    number_of = {name: number for number, name in reversed(list(enumerate(classes)))}
    by_row = {}
    for number in rows.good:
        label = rows.columns["labels"][number]
        if isinstance(label, str) and label.strip():
            if label.strip() not in number_of:
                raise EvaluationError(
                    f"{rows.name(number)} of '{rows.task}' has the label '{label}', which is not a class."
                )
            by_row[number] = number_of[label.strip()]
            continue
        label_number = _as_whole_number(label)
        if label_number is None or is_unlabelled(label):
            rows.skipped[number] = RowError("no label", f"{label!r:.100}")
        elif not 0 <= label_number < len(classes):
            raise EvaluationError(
                f"{rows.name(number)} of '{rows.task}' has the label {label_number}, but there are {len(classes)} "
                "classes, from 0."
            )
        else:
            by_row[number] = label_number
    return by_row


def is_unlabelled(label: Any) -> bool:
    """Return whether a label means "no label": None, an empty name, or -1 as in unlabelled splits of the Hub."""
    return label is None or (not label.strip() if isinstance(label, str) else _as_whole_number(label) == -1)


def _as_whole_number(value: Any) -> int | None:
    try:
        return int(value) if float(value) == int(value) else None
    except (TypeError, ValueError, OverflowError):
        return None
