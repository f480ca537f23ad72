"""Checks what `bifocal export` is asked for. Imports nothing heavy, so that a wrong argument is reported at once."""

import json
import re
from pathlib import Path
from typing import Any

from huggingface_hub.utils import HFValidationError, validate_repo_id

from bifocal.errors import BifocalError
from bifocal.files import MODEL, NotOursError, require_replaceable

MAX_SHARD_SIZE = "2GB"


class ExportError(BifocalError):
    """A model that cannot be exported, or an option of the export that is not valid."""


def check_export(
    run: Path, out: Path, repo_id: str | None, results: Path | None, onnx_eval_data: str | None, max_shard_size: str
) -> tuple[Path, dict[str, Any] | None]:
    """Check the arguments of `export_run`; return the model's folder, and what `results` says of it (or None).

    Raises:
        DataError, ExportError, NotOursError: as `export_run`.
    """
    require_shard_size(max_shard_size)
    _require_repo_id(repo_id)
    folder = run / "model" if (run / "model" / "config.json").exists() else run
    if not (folder / "config.json").exists():
        raise ExportError(f"'{run}' holds no model. Give the folder of a finished run or of a model.")
    _require_apart(out, run, folder)
    require_replaceable(out, MODEL)
    if onnx_eval_data is not None:
        from bifocal.data.locate import locate
        from bifocal.data.source import Source

        locate(Source(path=onnx_eval_data), "image-text")
    return folder, None if results is None else _read_results(results, folder)


def require_shard_size(size: str | int) -> None:
    """Check the largest size of a weights file.

    Raises:
        ExportError: if it is not a size.
    """
    number = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:[KMGT]B)", str(size).strip(), re.IGNORECASE)
    if not (number and float(number[1]) > 0) and not (isinstance(size, int) and size > 0):
        raise ExportError(
            f"'{size}' is not a file size. Write a number with KB, MB, GB or TB, such as {MAX_SHARD_SIZE}."
        )


def _require_repo_id(repo_id: str | None) -> None:
    try:
        validate_repo_id(repo_id)  # accepts None
    except HFValidationError as error:
        raise ExportError(
            f"'{repo_id}' is not the name of a repository. Write organisation/name with letters, digits, '-', '_' and "
            "'.'."
        ) from error


def _require_apart(out: Path, run: Path, model: Path) -> None:
    """Check that an export into `out` would not touch the model; a folder beside it, in the run's folder, is fine.

    Raises:
        NotOursError: if it would.
    """
    target = out.expanduser().resolve()
    for source in (run.resolve(), model.resolve()):
        if source.is_relative_to(target):
            raise NotOursError(f"'{out}' is or holds the folder to export. Choose another folder.")
    if target.is_relative_to(model.resolve()):
        raise NotOursError(f"'{out}' lies in the model to export. Choose another folder.")


def _read_results(results: Path, folder: Path) -> dict[str, Any]:
    """Return what `bifocal evaluate` measured of the model, by task."""
    path = results / "results.json" if results.is_dir() else results
    try:
        by_model = json.loads(path.read_text(encoding="utf-8"))
        matching = [tasks for name, tasks in by_model.items() if Path(name).resolve() == folder.resolve()]
        if not matching and len(by_model) == 1:
            matching = list(by_model.values())
        if not matching:
            raise ExportError(
                f"'{path}' has results of {', '.join(by_model)}, but not of '{folder}'. Evaluate that model first."
            )
        for entry in matching[0].values():
            _ = entry["kind"], entry["main"] in entry["metrics"]
    except ExportError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ExportError(f"'{path}' is not a results.json of bifocal evaluate ({error}).") from error
    return matching[0]
