"""Test the paper's claims at small scale.

Run in a checkout: python -m benchmarks.claims [--only multi-task] [--budget 15] [--data FOLDER]
"""

from pathlib import Path
from typing import Annotated

import typer

from bifocal.cli.console import Command, require, writes_into

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(cls=Command)
def claims(
    only: Annotated[list[str] | None, typer.Option(help="Name of a claim; all if omitted. Repeat for several.")] = None,
    budget: Annotated[
        float, typer.Option(help="Minutes per claim. 40 train all steps; fewer train a share of them.")
    ] = 40.0,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Folder with cifar10/{train,validation}.parquet, captions/flickr30k-{train,val}.jsonl and "
            "stsb/stsb-dev.csv; clipart/{train,validation}.parquet is optional, symbols replace it. If omitted, these "
            "come from the Hub, without clip art; without network, symbols replace them."
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for results. Finished results are cached and reused.")] = Path(
        "runs/claims"
    ),
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds.")] = 3,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Number of processes that share the cores; one per core if omitted.")
    ] = None,
) -> None:
    """Test the paper's claims at small scale, and write a page with a verdict on each."""
    require("datasets", "jinja2", "matplotlib", "scipy", "sentence_transformers")
    from benchmarks.claims.runner import available_cores, run_claims
    from bifocal.progress import no_progress_bars

    writes_into(out, "free space and run the command again to resume")
    with no_progress_bars():
        results = run_claims(out, data, only or (), budget, range(seeds), typer.echo, workers or available_cores())
    for result in results:
        typer.echo(f"{'shown    ' if result.verdict.shown else 'not shown'}  {result.claim.title}")
    typer.echo(f"See {out / 'claims.html'}.")


if __name__ == "__main__":
    app()
