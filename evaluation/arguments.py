"""Checks what `bifocal evaluate` is asked for. Imports nothing heavy, so that a wrong argument is reported at once."""

from collections.abc import Sequence
from pathlib import Path

from bifocal.data.vector_cache import require_cache_folder
from bifocal.errors import EvaluationError, looks_like_path
from bifocal.evaluation.suites import EvaluationSuite, load_suite
from bifocal.files import require_overwritable

EVALUATION = "evaluation"  # kind of the files `report.html` and `results.json`


def check_evaluation(
    models: Sequence[str], out: Path, suite: str | None = None, mteb: Sequence[str] = (), only: Sequence[str] = (),
    cache: Path | None = None,
) -> EvaluationSuite | None:  # fmt: skip
    """Check the arguments of `run_evaluation`, as far as they are local; return its suite, None for tasks of mteb only.

    Raises:
        EvaluationError, NotOursError, RecipeError: as `run_evaluation`.
    """
    loaded = None if suite is None and mteb else load_suite(suite or "symbols")
    if loaded is not None:
        loaded.select(only)
    require_folder(out)
    for name in ("results.json", "report.html"):
        require_overwritable(out / name, EVALUATION)
    if cache is not None:
        require_cache_folder(cache)
    for model in models:
        is_local_model(model)
    return loaded


def require_folder(out: Path) -> None:
    """Check that a folder of results is none that exists as a file.

    Raises:
        EvaluationError: if it is a file.
    """
    if out.exists() and not out.is_dir():
        raise EvaluationError(f"'{out}' is a file, and the results need a folder; choose another with --out.")


def is_local_model(path: str) -> bool:
    """Return whether a path is a local folder with a model, and not a Hub id.

    Raises:
        EvaluationError: if it can only be a local path, but no model is there.
    """
    folder = Path(path).expanduser()
    if folder.is_file():
        raise EvaluationError(f"'{path}' is a file; give the folder of a model.")
    if folder.is_dir():
        if any((folder / name).is_file() for name in ("config.json", "modules.json")):
            return True
        inner = next((name for name in ("model", "final") if (folder / name / "config.json").is_file()), None)
        hint = f"; did you mean '{Path(path) / inner}'?" if inner else "."
        raise EvaluationError(f"'{path}' holds no model: there is neither config.json nor modules.json in it{hint}")
    if looks_like_path(path):
        raise EvaluationError(f"There is no model at '{path}'; check the path.")
    return False
