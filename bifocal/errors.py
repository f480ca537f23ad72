"""Errors that end a command in one sentence, and sentences that several rooms share."""

import difflib
from collections.abc import Iterable
from pathlib import Path


class BifocalError(ValueError):
    """What a user can do something about, in one or two sentences. The command line prints it without a traceback."""


class DataError(BifocalError):
    """A source that cannot be read."""


class RecipeError(BifocalError):
    """A recipe or setting that cannot be carried out, with the file and line or the override where it was given."""


class TrainingError(BifocalError):
    """Why a training run cannot start or continue."""


class EvaluationError(BifocalError):
    """What cannot be evaluated."""


def model_not_loaded(place: str | Path, error: Exception, wanted: str = "model") -> str:
    """Return a sentence on a model that could not be loaded, which speaks of the Hub only where a Hub id was given.

    Args:
        place: what was given: a folder or a Hub id.
        error: what loading it raised.
        wanted: what it should have been, such as "sentence-transformers model".
    """
    given, path = str(place), Path(place).expanduser()
    if path.is_file():
        return f"'{given}' is a file, not the folder of a {wanted}. Give its folder or a Hub id."
    if path.is_dir():
        if not any((path / name).exists() for name in ("config.json", "modules.json")):
            return f"'{given}' holds no {wanted} (it has no config.json). Give a model's folder or a Hub id."
        return f"The {wanted} in '{given}' cannot be loaded ({first_line(error)})."
    if looks_like_path(given):
        return f"'{given}' does not exist. Give the folder of a {wanted} or a Hub id."
    return (
        f"'{given}' is neither a folder here nor a {wanted} that could be fetched from the Hub ({first_line(error)})."
    )


def looks_like_path(given: str) -> bool:
    """Return whether a string can only be meant as a path here: Hub ids are `name` or `organisation/name`."""
    first, slash, _ = given.partition("/")
    plain = given.startswith((".", "/", "~")) or given.endswith("/") or given.count("/") > 1 or "\\" in given
    return plain or (bool(slash) and Path(first).is_dir())


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its class where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def closest_name(name: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Return the known name that a misspelt one most likely means; None if none is similar.

    Args:
        cutoff: least similarity, from 0 to 1.
    """
    return next(iter(difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)), None)
