"""The names of classes, where a data set holds their numbers (`datasets.ClassLabel`)."""

from typing import Any


def class_names(features: Any) -> dict[str, list[str]]:
    """Return the names of the classes of each column that has them, also of lists of labels."""
    from datasets import ClassLabel

    found = {}
    for column, feature in (features or {}).items():
        inner = getattr(feature, "feature", feature)
        if isinstance(inner, ClassLabel) and inner.names:
            found[column] = list(inner.names)
    return found


def schema_class_names(schema: Any) -> dict[str, list[str]]:
    """Return the same of an Arrow schema, in whose metadata `datasets` keeps its features."""
    if b"huggingface" not in (schema.metadata or {}):
        return {}
    from datasets import Features

    try:
        return class_names(Features.from_arrow_schema(schema))
    except (KeyError, TypeError, ValueError):  # written by a release that knows other features
        return {}


def with_class_names(row: dict[str, Any], names: dict[str, list[str]]) -> dict[str, Any]:
    """Return a row with names in place of numbers; None where a number is no class, as -1 means no label."""
    return {**row, **{column: _named(row[column], known) for column, known in names.items() if column in row}}


def _named(value: Any, names: list[str]) -> Any:
    if isinstance(value, list):
        return [_named(one, names) for one in value]
    return names[value] if isinstance(value, int) and 0 <= value < len(names) else None
