"""The recipes that come with Bifocal. Imports nothing heavy, so that they are listed and copied at once."""

from pathlib import Path

from bifocal.errors import RecipeError

SHIPPED = Path(__file__).parent / "recipes"


def shipped_recipes() -> dict[str, Path]:
    """Return the files of the recipes that come with Bifocal, by name."""
    names = {path.relative_to(SHIPPED).with_suffix("").as_posix(): path for path in sorted(SHIPPED.rglob("*.yaml"))}
    return {name: path for name, path in names.items() if not name.startswith("accelerate/")}


def shipped_recipe(name: str) -> Path:
    """Return the file of a recipe that comes with Bifocal.

    Raises:
        RecipeError: if there is no recipe of this name.
    """
    recipes = shipped_recipes()
    if name not in recipes:
        raise RecipeError(f"There is no recipe '{name}'; give a file or one of {', '.join(recipes)}.")
    return recipes[name]


def recipe_summary(path: Path) -> str:
    """Return the first sentence of a recipe's head comment."""
    head = [line.removeprefix("#").strip() for line in path.read_text(encoding="utf-8").splitlines() if line[:1] == "#"]
    return " ".join(head).partition(". ")[0].removesuffix(".")


def copy_recipe(name: str, out: Path) -> None:
    """Copy a recipe to a new file.

    Raises:
        RecipeError: if there is no recipe of this name, the file exists, or its folder does not.
        OSError: if the file cannot be written.
    """
    text = shipped_recipe(name).read_text(encoding="utf-8")
    try:
        with out.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise RecipeError(f"'{out}' exists already. Choose another file.") from None
    except FileNotFoundError:
        raise RecipeError(f"There is no folder '{out.parent}'. Make it, or choose another file.") from None
