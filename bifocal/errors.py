"""Errors that a user can fix (the command line prints them without a stack trace), and messages that rooms share."""

import difflib
from collections.abc import Iterable
from pathlib import Path


class BifocalError(ValueError):
    """An error that a user can fix, in one or two sentences; the command line prints it without a stack trace."""


class DataError(BifocalError):
    """A source that cannot be read."""


class RecipeError(BifocalError):
    """A recipe or setting that is not valid; the message has its file and line, or the override."""


class TrainingError(BifocalError):
    """A training run that cannot start or resume."""


class ModelError(BifocalError):
    """A model that does not exist, cannot be loaded, or does not embed what a command needs."""


class EvaluationError(BifocalError):
    """A model or task that cannot be evaluated."""


def require_local_model(source: str | Path, expected: str = "model") -> None:
    """Check, without loading it, that a local path is the folder of a model. A Hub id passes.

    Args:
        source: folder or Hub id.
        expected: kind of model, such as "sentence-transformers model".

    Raises:
        ModelError: if it can only be a local path, but no model is there.
    """
    problem = _local_path_problem(source, expected)
    if problem is not None:
        raise ModelError(problem)
    path = Path(source).expanduser()
    if path.is_dir() and not _has_model(path):
        raise ModelError(
            f"'{source}' holds no model: it has no config.json with a model_type. Give a model's folder or id."
        )


def _has_model(folder: Path) -> bool:
    return any((folder / file).exists() for file in ("config.json", "modules.json"))


def _local_path_problem(source: str | Path, expected: str) -> str | None:
    """Return a message on a path that can only be local and is not a folder; None for others."""
    name, path = str(source), Path(source).expanduser()
    if path.is_file():
        return f"'{name}' is a file, not the folder of a {expected}. Give its folder or a Hub id."
    if not path.is_dir() and looks_like_path(name):
        return f"'{name}' does not exist. Give the folder of a {expected} or a Hub id."
    return None


def model_not_loaded(source: str | Path, error: Exception, expected: str = "model") -> str:
    """Return a message on a model that could not be loaded, which mentions the Hub only if the source is a Hub id.

    Args:
        source: folder or Hub id.
        error: error that loading it raised.
        expected: kind of model, such as "sentence-transformers model".
    """
    name, path = str(source), Path(source).expanduser()
    problem = _local_path_problem(source, expected)
    if problem is not None:
        return problem
    if isinstance(error, ValueError) and str(error).startswith(f"'{name}' "):
        return str(error)  # a sentence of ours
    if path.is_dir():
        if not _has_model(path):
            return f"'{name}' holds no {expected} (it has no config.json). Give a model's folder or a Hub id."
        return f"The {expected} in '{name}' cannot be loaded ({first_line(error)})."
    if not isinstance(error, OSError):
        return f"The {expected} '{name}' cannot be loaded ({first_line(error)})."
    return f"'{name}' is neither a local folder nor a {expected} on the Hub ({first_line(error)})."


def looks_like_path(source: str) -> bool:
    """Return whether a string can only be a local path: Hub ids are `name` or `organisation/name`."""
    first, slash, _ = source.partition("/")
    is_path = source.startswith((".", "/", "~")) or source.endswith("/") or source.count("/") > 1 or "\\" in source
    return is_path or (bool(slash) and Path(first).is_dir())


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its class if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def closest_name(name: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Return the known name that a misspelt one most likely means; None if none is similar.

    Args:
        cutoff: least similarity, from 0 to 1.
    """
    return next(iter(difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)), None)
