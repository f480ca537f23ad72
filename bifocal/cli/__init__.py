"""The `bifocal` command."""

from typing import Annotated

import typer

from bifocal.cli.console import Group
from bifocal.cli.data import data
from bifocal.cli.demo import demo
from bifocal.cli.embed import embed
from bifocal.cli.evaluate import evaluate
from bifocal.cli.hub import convert, export, push
from bifocal.cli.recipes import recipes
from bifocal.cli.search import export_lancedb, index, remove, search
from bifocal.cli.serve import serve
from bifocal.cli.train import mine, train

app = typer.Typer(
    name="bifocal",
    cls=Group,
    help=(
        "One model for image search and text search.\n\n"
        "Bifocal trains, evaluates and publishes models that embed images and texts into one space, in the three "
        "stages of Jina CLIP (arXiv 2405.20204)."
    ),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


app.add_typer(data)
app.add_typer(recipes)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"bifocal {version('bifocal')}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options of `bifocal` itself."""


for command in (
    demo,
    train,
    mine,
    evaluate,
    convert,
    export,
    push,
    embed,
    index,
    search,
    remove,
    export_lancedb,
    serve,
):
    app.command()(command)


@app.command()
def version() -> None:
    """Print the version."""
    _print_version(True)


def main() -> None:
    app()
