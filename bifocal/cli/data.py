"""The commands `bifocal data ...`: look at corpora and sources, clean them, caption pictures."""

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from bifocal.cli.console import require, writes_into
from bifocal.errors import BifocalError

data = typer.Typer(name="data", help="Look at training data, clean it, caption pictures.", no_args_is_help=True)

Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        help="key=value of a source, such as columns.caption=title, images=FOLDER, delimiter=';' or clean.min_side=64."
    ),
]
SourceArgument = Annotated[str, typer.Argument(help="Files, a pattern, a folder, a Hub id or corpus:NAME.")]
Kind = Annotated[
    str | None, typer.Option(help="image-text, text-pair, text-triplet or text-only; told by the columns if not given.")
]


@data.command("list")
def list_corpora() -> None:
    """Print the public corpora that a recipe can name."""
    require("pydantic", "yaml")
    from bifocal.data.corpora import listing

    typer.echo(listing())


@data.command()
def show(name: Annotated[str, typer.Argument(help="One that `bifocal data list` prints.")]) -> None:
    """Explain one corpus, and print what a recipe needs for it."""
    require("pydantic", "yaml")
    from bifocal.data.corpora import explained

    typer.echo(explained(name))


@data.command()
def inspect(
    source: SourceArgument,
    overrides: Overrides = None,
    kind: Kind = None,
    rows: Annotated[int, typer.Option(min=0, help="Look at so many rows; 0 means all.")] = 10_000,
    out: Annotated[Path, typer.Option(help="HTML page to write.")] = Path("runs/data.html"),
) -> None:
    """Write a page about a source: counts, lengths, sizes, duplicates, a sample, what is left out and why."""
    require("datasets", "jinja2", "matplotlib", "pydantic")
    from bifocal.data.inspection import inspect_source
    from bifocal.data.inspection_page import PAGE, write_data_page
    from bifocal.data.loading import guess_kind
    from bifocal.data.source import source_of
    from bifocal.files import require_overwritable

    if out.is_dir():
        raise BifocalError(f"'{out}' is a folder. Give the HTML file to write with --out.")
    writes_into(out.parent)
    require_overwritable(out, PAGE)
    given = source_of(source, overrides)
    found = inspect_source(given, _kind(kind) or guess_kind(given), rows or None)
    write_data_page(asdict(found), out)
    typer.echo(f"{found.good:,} of {found.rows:,} rows can be used; see {out}.")


@data.command()
def clean(
    source: SourceArgument,
    out: Annotated[Path, typer.Argument(help="Folder of Parquet files to write.")],
    overrides: Overrides = None,
    kind: Kind = None,
) -> None:
    """Write the rows of a source that pass its filters into a folder of Parquet files, which may be streamed."""
    require("datasets", "pydantic")
    from bifocal.data.clean_copy import write_clean
    from bifocal.data.loading import guess_kind
    from bifocal.data.skips import Skipped, summary
    from bifocal.data.source import source_of

    writes_into(out)
    skipped = Skipped(out / "skipped.jsonl")
    given = source_of(source, overrides)
    rows = write_clean(given, _kind(kind) or guess_kind(given), out, skipped)
    left_out: Counter[str] = Counter()
    for counts in [*skipped.bad.values(), *skipped.dropped.values()]:
        left_out += counts
    said = f"; left out: {summary(left_out)} (see {out / 'skipped.jsonl'})" if left_out else ""
    typer.echo(f"{rows:,} rows are in {out}{said}.")


@data.command()
def caption(
    source: SourceArgument,
    out: Annotated[Path, typer.Argument(help="Folder for the captions; a killed run there goes on.")],
    model: Annotated[str, typer.Option(help="An image-text model of transformers, by Hub id or folder.")],
    overrides: Overrides = None,
    recipe: Annotated[
        Path | None, typer.Option(help="YAML with the prompt; the one that comes with Bifocal if none.")
    ] = None,
) -> None:
    """Write long captions for pictures, so that stage 2 has something to train on."""
    require("datasets", "pydantic")
    from bifocal.data.captioning import caption_recipe, caption_source
    from bifocal.data.source import source_of

    writes_into(out, "free space and run the command again; it resumes")
    made = caption_source(source_of(source, overrides), out, caption_recipe(model, recipe))
    before = f", {made.before:,} were there before" if made.before else ""
    skipped = f", {made.skipped:,} left out (see {out / 'skipped.jsonl'})" if made.skipped else ""
    typer.echo(f"{made.made:,} captions are in {out}{before}{skipped}; in a recipe: path: {out}/*.parquet, images: /.")


def _kind(given: str | None) -> str | None:
    from bifocal.data.kinds import KINDS

    if given is not None and given not in KINDS:
        raise BifocalError(f"'{given}' is no kind of rows; it must be one of {', '.join(KINDS)}.")
    return given
