"""The folder of a run and the folders that it starts from. Imports nothing heavy, so that `bifocal train` checks them
at once.
"""

from pathlib import Path

from bifocal.errors import RecipeError, looks_like_path
from bifocal.files import MARKER
from bifocal.training.recipe import Recipe, StartFrom

RESOLVED = "recipe.yaml"  # the resolved recipe in a run's folder


def require_run_folder(folder: Path) -> None:
    """Check that a folder is new, empty or that of a run.

    Raises:
        RecipeError: if it is not.
    """
    if folder.exists() and not folder.is_dir():
        raise RecipeError(f"'{folder}' is a file. Set another output_dir.")
    others = any(path.name != MARKER for path in folder.iterdir()) if folder.exists() else False
    if others and not (folder / RESOLVED).exists():
        raise RecipeError(f"'{folder}' holds other files, but no run. Set another output_dir.")


def require_start(recipe: Recipe) -> None:
    """Check that the local models that a recipe starts from exist.

    Raises:
        RecipeError: if one does not.
    """
    for path in start_paths(recipe):
        if looks_like_path(path) and not Path(path).expanduser().exists():
            raise RecipeError(
                f"Recipe '{recipe.name}', start_from: The folder '{path}' does not exist; check the path."
            )


def start_paths(recipe: Recipe) -> list[str]:
    """Return the folders or Hub ids whose weights a recipe starts from."""
    start = recipe.start_from
    if start is None or isinstance(start, str):
        return [] if start is None else [start]
    if start.stage is not None:
        return [str(stage_folder(recipe, start))]
    return [path for path in (start.text, start.image) if path is not None]


def stage_folder(recipe: Recipe, start: StartFrom) -> str:
    """Return the folder of the finished model of an earlier stage.

    Raises:
        RecipeError: if the stage is not trained yet.
    """
    folder = Path("runs") / str(start.stage) / "model"
    if not (folder / "config.json").exists():
        raise RecipeError(
            f"Recipe '{recipe.name}' starts from stage '{start.stage}', but {folder} does not exist. "
            f"Run `bifocal train {start.stage}` first."
        )
    return str(folder)
