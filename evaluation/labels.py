"""Labels and names of classes, from numbers, names or a `ClassLabel` column."""

from collections.abc import Mapping, Sequence
from typing import Any

from bifocal.data.skips import Fault
from bifocal.errors import EvaluationError
from bifocal.evaluation.rows import Rows, several


def class_names(task: str, labels: Any, classes: Sequence[str] | None) -> list[str]:
    """Return the names of the classes: those given, those of a `ClassLabel` column, or the labels if they are names.

    Raises:
        EvaluationError: if the classes have no names, or are named by numbers, of which no prompt can be made.
    """
    if classes is None:
        source, column = getattr(labels, "source", None), getattr(labels, "column_name", None)
        feature = getattr(source, "features", None)
        named = getattr(feature.get(column), "names", None) if isinstance(feature, Mapping) else None
        classes = named or sorted({label.strip() for label in labels if isinstance(label, str) and label.strip()})
        if not classes:
            raise EvaluationError(
                f"The labels of '{task}' are numbers without names; give classes, such as dataset.features"
                "['label'].names."
            )
    names = [str(one) for one in several(task, "classes", classes)]
    numbers = [one for one in names if one.strip().lstrip("+-").isdigit()]
    if numbers:
        raise EvaluationError(
            f"The classes of '{task}' are named by numbers ({', '.join(numbers[:4])}), which make no prompts; give "
            "their names under classes, digits in words."
        )
    return names


def class_numbers(rows: Rows, classes: Sequence[str]) -> dict[int, int]:
    """Return the number of each row's class; rows without a label are skipped.

    Raises:
        EvaluationError: if a label is no class.
    """
    known = {one: number for number, one in reversed(list(enumerate(classes)))}
    found = {}
    for number in rows.good:
        label = rows.columns["labels"][number]
        if isinstance(label, str) and label.strip():
            if label.strip() not in known:
                raise EvaluationError(
                    f"{rows.name(number)} of '{rows.task}' has the label '{label}', which is no class."
                )
            found[number] = known[label.strip()]
            continue
        place = _whole(label)
        if place is None or is_unlabelled(label):
            rows.skipped[number] = Fault("no label", f"{label!r:.100}")
        elif not 0 <= place < len(classes):
            raise EvaluationError(
                f"{rows.name(number)} of '{rows.task}' has the label {place}, but there are {len(classes)} classes, "
                "from 0."
            )
        else:
            found[number] = place
    return found


def is_unlabelled(label: Any) -> bool:
    """Return whether a label says that there is none: None, an empty name, or -1 as in unlabelled splits of the Hub."""
    return label is None or (not label.strip() if isinstance(label, str) else _whole(label) == -1)


def _whole(value: Any) -> int | None:
    try:
        return int(value) if float(value) == int(value) else None
    except (TypeError, ValueError, OverflowError):
        return None
