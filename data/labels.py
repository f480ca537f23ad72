"""Class names for data sets that hold class numbers (`datasets.ClassLabel`)."""

from typing import Any


def class_names(features: Any) -> dict[str, list[str]]:
    """Return the names of the classes of each column that has them, also of lists of labels."""
    from datasets import ClassLabel

    names = {}
    for column, feature in (features or {}).items():
        inner = getattr(feature, "feature", feature)
        if isinstance(inner, ClassLabel) and inner.names:
            names[column] = list(inner.names)
    return names


def schema_class_names(schema: Any) -> dict[str, list[str]]:
    """Return the same for an Arrow schema, in whose metadata `datasets` stores its features."""
    if b"huggingface" not in (schema.metadata or {}):
        return {}
    from datasets import Features

    try:
        return class_names(Features.from_arrow_schema(schema))
    except (KeyError, TypeError, ValueError):  # written by a release with other features
        return {}


def with_class_names(row: dict[str, Any], names: dict[str, list[str]]) -> dict[str, Any]:
    """Return a row with class names for numbers; None for a number that is not a class, such as -1 for no label."""
    return {**row, **{column: _named(row[column], known) for column, known in names.items() if column in row}}


def _named(value: Any, names: list[str]) -> Any:
    if isinstance(value, list):
        return [_named(item, names) for item in value]
    return names[value] if isinstance(value, int) and 0 <= value < len(names) else None
