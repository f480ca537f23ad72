"""Settings from YAML and from key=value on the command line, validated against a schema."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from bifocal.errors import RecipeError, closest_name, first_line


class Strict(BaseModel):
    """A part of a recipe. An unknown key is an error."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file.

    Raises:
        RecipeError: if the file cannot be read, is not UTF-8, not YAML or not a mapping.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"{path} cannot be read ({error.strerror}). Give a YAML file.") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is not a text file in UTF-8. Give a YAML file.") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or first_line(error)
        raise RecipeError(f"{path}{line}: this is not valid YAML ({problem}).") from error
    if not isinstance(values, dict):
        raise RecipeError(f"{path} is not a mapping of keys to values, as a recipe is.")
    return values


def validated(model: Any, values: dict[str, Any], overrides: list[str]) -> Any:
    """Return an object of a schema.

    Raises:
        RecipeError: if a key is unknown or a value is wrong; it names the override that set it.
    """
    try:
        return model(**values)
    except ValidationError as error:
        first = min(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
        where = ".".join(map(str, first["loc"]))
        setting = next((o for o in overrides if o.partition("=")[0] == where), where)
        raise RecipeError(f"'{setting}': {ended(problem_of(first, model))}") from error


def set_override(values: dict[str, Any], override: str) -> tuple[Any, ...]:
    """Set a value in nested settings and return its position, such as `("tasks", 0, "batch_size")`.

    Args:
        override: `key=value` with dots between nested keys. In a list, a part is an item's name or number. What follows
            `column_mapping.` is one column, dots included; it replaces the column that had the same new name.
    """
    key, equals, text = override.partition("=")
    if not equals:
        raise RecipeError(f"'{override}' is not an override; write key=value, such as training.max_steps=100.")
    parent: Any = values
    where: list[Any] = []
    outer, mapping, column = key.partition("column_mapping.")
    parts = [*outer.split(".")[:-1], "column_mapping", column] if mapping else key.split(".")
    for number, part in enumerate(parts):
        step: Any = part
        if isinstance(parent, list):
            names = [item.get("name") for item in parent]
            if part in names:
                step = names.index(part)
            elif part.isdigit() and int(part) < len(parent):
                step = int(part)
            else:
                raise RecipeError(f"'{override}': there is no '{part}' among {', '.join(map(str, names))}.")
        where.append(step)
        if number == len(parts) - 1:
            # A pipe and a tab have a meaning in YAML.
            value = text.strip("'\"") if step == "delimiter" else _yaml_value(override, text)
            if mapping:
                for replaced in [column for column, name in parent.items() if name == value]:
                    del parent[replaced]
            parent[step] = value
        else:
            if isinstance(parent, dict) and not isinstance(parent.get(step), dict | list):
                parent[step] = {}
            parent = parent[step]
    return tuple(where)


def require_distinct_columns(overrides: Sequence[str]) -> None:
    """Refuse overrides of which two map one column: the second would silently replace the first.

    Raises:
        RecipeError: if a column is mapped twice.
    """
    keys = [key for key, _, _ in (override.partition("=") for override in overrides) if "column_mapping." in key]
    twice = next((key for number, key in enumerate(keys) if key in keys[:number]), None)
    if twice is not None:
        raise RecipeError(f"'{twice}' is given twice. A column can have one new name; copy it to use it as two.")


def _yaml_value(override: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"'{override}': '{text}' is not valid YAML ({getattr(error, 'problem', error)}).") from error


def problem_of(error: Any, model: type[BaseModel]) -> str:
    """Return one of pydantic's errors as part of a sentence."""
    loc = error["loc"]
    key = next((str(part) for part in reversed(loc) if isinstance(part, str)), "the recipe")
    if error["type"] == "extra_forbidden":
        return f"unknown key '{key}'{key_hint(key, _known(loc, model))}"
    if error["type"] == "missing":
        return f"the key '{key}' is missing"
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    return f"'{key}' is {error['input']!r}, but: {error['msg'].lower()}"


def _known(loc: tuple[Any, ...], model: type[BaseModel]) -> list[str]:
    """Return the keys of the part of a schema that has an unknown key."""
    for part in loc[:-1]:
        field = model.model_fields.get(part) if isinstance(part, str) else None
        model = (_schema_in(field.annotation) if field is not None else None) or model
    return list(model.model_fields)


def _schema_in(annotation: Any) -> type[BaseModel] | None:
    """Return the schema in a type such as `Schema`, `list[Schema]` or `str | Schema | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((schema for part in get_args(annotation) if (schema := _schema_in(part)) is not None), None)


def key_hint(key: str, known: Iterable[str]) -> str:
    """Return the end of a sentence on an unknown key: the key that it may mean, or the keys that there are."""
    names = list(known)
    closest = closest_name(key, names)
    return f"; did you mean '{closest}'?" if closest else f"; the keys here are {', '.join(names[:20])}"


def ended(sentence: str) -> str:
    """Return a sentence with a full stop, unless it ends with one or with a question mark."""
    return sentence if sentence.endswith(("?", ".")) else f"{sentence}."
