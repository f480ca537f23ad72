"""The commands `bifocal recipes ...`: list the recipes that come with Bifocal, print one, copy one to edit."""

from pathlib import Path
from typing import Annotated

import typer

from bifocal.cli.console import writes_into
from bifocal.training.shipped_recipes import copy_recipe, recipe_summary, shipped_recipe, shipped_recipes

recipes = typer.Typer(name="recipes", help="List, print or copy the recipes of Bifocal.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(help="A recipe that `bifocal recipes list` prints.")]


@recipes.command("list")
def list_recipes() -> None:
    """Print the recipes that come with Bifocal, and what each is for."""
    shipped = shipped_recipes()
    width = max(map(len, shipped))
    for name, path in shipped.items():
        typer.echo(f"{name:<{width}}  {recipe_summary(path)}")


@recipes.command()
def show(name: Name) -> None:
    """Print one recipe."""
    typer.echo(shipped_recipe(name).read_text(encoding="utf-8"), nl=False)


@recipes.command()
def copy(
    name: Name,
    out: Annotated[Path | None, typer.Argument(help="File to write; NAME.yaml if omitted. It must not exist.")] = None,
) -> None:
    """Copy one recipe to a file of your own, to edit and start with `bifocal train FILE`."""
    out = out or Path(f"{name.rpartition('/')[2]}.yaml")
    writes_into(out.parent)
    copy_recipe(name, out)
    typer.echo(f"The recipe is in {out}. Start it with: bifocal train {out}")
