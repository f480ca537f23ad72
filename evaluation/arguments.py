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
    for model in models:
        is_local_model(model)
    if cache is not None:
        _require_own_folder(require_cache_folder(cache), out, models)
    return loaded


def _require_own_folder(cache: Path, out: Path, models: Sequence[str]) -> None:
    """Check that a cache is not the folder of the results, nor inside a model: its results would be measured again.

    Raises:
        EvaluationError: if it is.
    """
    folder = cache.resolve()
    if folder == out.resolve():
        raise EvaluationError(f"'{cache}' is the folder of the results, too. Choose another with --cache.")
    for model in models:
        model_folder = Path(model).expanduser()
        if model_folder.is_dir() and folder.is_relative_to(model_folder.resolve()):
            raise EvaluationError(f"'{cache}' is inside the model '{model}'. Choose another folder with --cache.")


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
