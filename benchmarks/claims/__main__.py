"""Try the claims: `python -m benchmarks.claims` in a checkout."""

from pathlib import Path
from typing import Annotated

import typer

from bifocal.cli.console import Command, require, writes_into
from bifocal.errors import BifocalError

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(cls=Command)
def claims(
    only: Annotated[list[str] | None, typer.Option(help="Name of a claim; several times. All if none.")] = None,
    budget: Annotated[
        float, typer.Option(help="Minutes for a claim, of the 40 that it takes with all its steps.")
    ] = 40.0,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Folder with cifar10/{train,validation}.parquet, captions/flickr30k-{train,val}.jsonl and "
            "stsb/stsb-dev.csv. Symbols stand for photos and captions without it."
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for results; what is done there is not done again.")] = Path(
        "runs/claims"
    ),
    seeds: Annotated[int, typer.Option(min=1, help="How many.")] = 3,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes that share the cores; one for each core if not given.")
    ] = None,
) -> None:
    """Try the paper's claims at small scale, and write a page with a verdict on each."""
    require("datasets", "jinja2", "matplotlib", "scipy", "sentence_transformers")
    from benchmarks.claims.runner import available_cores, try_claims
    from bifocal.progress import no_progress_bars

    writes_into(out, "free space and run the command again; it resumes")
    with no_progress_bars():
        tried = try_claims(out, data, only or (), budget, range(seeds), typer.echo, workers or available_cores())
    if not tried:
        raise BifocalError("Nothing has been tried.")
    for one in tried:
        typer.echo(f"{'shown    ' if one.verdict.shown else 'not shown'}  {one.claim.title}")
    typer.echo(f"See {out / 'claims.html'}.")


if __name__ == "__main__":
    app()
