"""The command `evaluate`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from bifocal.cli.console import Dtype, FastDecoding, NumWorkers, require, writes_into


def evaluate(
    models: Annotated[
        list[str], typer.Argument(help="Folders or Hub ids of dual encoders or sentence-transformers models.")
    ],
    suite: Annotated[
        str | None,
        typer.Option(help="YAML file, or a suite that comes with Bifocal: symbols (the default) or captions."),
    ] = None,
    mteb: Annotated[
        list[str] | None,
        typer.Option(help="Task of mteb, or a suite of them: paper or quick. Repeat for several."),
    ] = None,
    only: Annotated[list[str] | None, typer.Option(help="Name of a task of the suite. Repeat for several.")] = None,
    out: Annotated[
        Path, typer.Option(help="Folder for results and report. Finished results are cached and reused.")
    ] = Path("runs/evaluation"),
    cache: Annotated[
        Path | None, typer.Option(help="Folder for vectors, with which a killed run resumes and a later one is quick.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the numbers as JSON.")] = False,
    card: Annotated[bool, typer.Option("--card", help="Write the results into each model's card.")] = False,
    dtype: Dtype = "model",
    num_workers: NumWorkers = None,
    fast_decoding: FastDecoding = False,
) -> None:
    """Compare models on your data or on MTEB, and write a report."""
    require("datasets", "jinja2", "matplotlib", "pydantic", "sklearn", "scipy", "sentence_transformers")
    from bifocal.evaluation.arguments import check_evaluation

    writes_into(out, "free space and run the command again to resume, or choose another --out")
    check_evaluation(models, out, suite, mteb or (), only or (), cache)

    from bifocal.data.vector_cache import VectorCache
    from bifocal.evaluation.report import summary_lines
    from bifocal.evaluation.runner import run_evaluation
    from bifocal.hub.card_results import add_results

    vectors = VectorCache(cache) if cache is not None else None
    evaluation = run_evaluation(models, out, suite, mteb or (), only or (), dtype, num_workers, fast_decoding, vectors)
    if vectors is not None and vectors.reused + vectors.embedded:
        typer.echo(f"{cache}: {vectors.reused:,} vectors reused, {vectors.embedded:,} embedded.", err=True)
    if card:
        for model in evaluation.results:
            add_results(Path(model), evaluation.card_rows(model), evaluation.hub_datasets)
    if as_json:
        typer.echo(json.dumps(evaluation.numbers, indent=2))
        return
    for line in summary_lines(evaluation.results):
        typer.echo(line)
    typer.echo(f"See {evaluation.page}.")
