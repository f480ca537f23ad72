"""Settings from YAML and from key=value on the command line, checked against a schema, with errors in one sentence."""

import difflib
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from bifocal.errors import RecipeError


class Strict(BaseModel):
    """A part of a recipe, in which an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file.

    Raises:
        RecipeError: if the file cannot be read, is not UTF-8, not YAML or not a mapping; with the line.
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
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise RecipeError(f"{path}{line}: this is not valid YAML ({problem}).") from error
    if not isinstance(values, dict):
        raise RecipeError(f"{path} does not hold a mapping of keys to values, as a recipe does.")
    return values


def validated(model: Any, values: dict[str, Any], overrides: list[str]) -> Any:
    """An object of a schema.

    Raises:
        RecipeError: an unknown key or a wrong value, in one sentence with the override it came by.
    """
    try:
        return model(**values)
    except ValidationError as error:
        first = min(error.errors(), key=lambda found: found["type"] != "extra_forbidden")
        where = ".".join(map(str, first["loc"]))
        given = next((o for o in overrides if o.partition("=")[0] == where), where)
        raise RecipeError(f"'{given}': {ended(problem_of(first, model))}") from error


def set_override(values: dict[str, Any], override: str) -> tuple[Any, ...]:
    """Set a value; returns where."""
    key, equals, text = override.partition("=")
    if not equals:
        raise RecipeError(f"'{override}' is no override; write key=value, such as training.max_steps=100.")
    place: Any = values
    where: list[Any] = []
    parts = key.split(".")
    for number, part in enumerate(parts):
        step: Any = part
        if isinstance(place, list):
            names = [item.get("name") for item in place]
            if part in names:
                step = names.index(part)
            elif part.isdigit() and int(part) < len(place):
                step = int(part)
            else:
                raise RecipeError(f"'{override}': there is no '{part}' among {', '.join(map(str, names))}.")
        where.append(step)
        if number == len(parts) - 1:
            # To YAML a pipe and a tab are signs of its own.
            place[step] = text.strip("'\"") if step == "delimiter" else _yaml_value(override, text)
        else:
            if isinstance(place, dict) and not isinstance(place.get(step), dict | list):
                place[step] = {}
            place = place[step]
    return tuple(where)


def _yaml_value(override: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"'{override}': '{text}' is no YAML ({getattr(error, 'problem', error)}).") from error


def problem_of(error: Any, model: type[BaseModel]) -> str:
    """The first of pydantic's errors in our words."""
    loc = error["loc"]
    key = next((str(part) for part in reversed(loc) if isinstance(part, str)), "the recipe")
    if error["type"] == "extra_forbidden":
        return f"unknown key '{key}'{nearest(key, _known(loc, model))}"
    if error["type"] == "missing":
        return f"the key '{key}' is missing"
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    return f"'{key}' is {error['input']!r}, but: {error['msg'].lower()}"


def _known(loc: tuple[Any, ...], model: type[BaseModel]) -> list[str]:
    """The keys of the part of a schema in which an unknown key was given."""
    for part in loc[:-1]:
        field = model.model_fields.get(part) if isinstance(part, str) else None
        model = (_schema_in(field.annotation) if field is not None else None) or model
    return list(model.model_fields)


def _schema_in(annotation: Any) -> type[BaseModel] | None:
    """The schema in a type such as `Schema`, `list[Schema]` or `str | Schema | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((schema for part in get_args(annotation) if (schema := _schema_in(part)) is not None), None)


def nearest(key: str, known: Any) -> str:
    near = difflib.get_close_matches(key, list(known), n=1)
    return f"; did you mean '{near[0]}'?" if near else f"; the keys here are {', '.join(list(known)[:20])}"


def ended(sentence: str) -> str:
    return sentence if sentence.endswith(("?", ".")) else f"{sentence}."
