"""The command `evaluate`."""

from pathlib import Path
from typing import Annotated

import typer

from bifocal.cli.console import require, writes_into
from bifocal.errors import BifocalError


def evaluate(
    models: Annotated[
        list[str], typer.Argument(help="Folders or Hub ids: Bifocal, sentence-transformers, CLIP, SigLIP.")
    ],
    suite: Annotated[
        str | None, typer.Option(help="A YAML file, or a suite that comes with Bifocal: symbols (if none), captions.")
    ] = None,
    mteb: Annotated[
        list[str] | None, typer.Option(help="A task of mteb, or a list of them: paper, quick; also several times.")
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(help="Name of a task of the suite; may be given several times.")
    ] = None,
    out: Annotated[
        Path, typer.Option(help="Folder for results and report; what is done there is not done again.")
    ] = Path("runs/evaluation"),
    as_json: Annotated[bool, typer.Option("--json", help="Print the numbers as JSON.")] = False,
    card: Annotated[bool, typer.Option("--card", help="Write the results into each model folder's card.")] = False,
) -> None:
    """Measure models side by side and write a page about it."""
    require("datasets", "jinja2", "matplotlib", "pydantic", "sklearn", "scipy", "sentence_transformers")
    import json

    from bifocal.evaluation.report import EVALUATION, remarks, summary, write_evaluation_page
    from bifocal.evaluation.runner import evaluate as measure
    from bifocal.evaluation.runner import load_evaluation_recipe, sources_on_hub
    from bifocal.files import overwrite, require_overwritable
    from bifocal.hub.card_results import add_results

    writes_into(out, "free space and run the command again to resume, or choose another --out")
    recipe = None if suite is None and mteb else load_evaluation_recipe(suite or "symbols")
    if out.exists() and not out.is_dir():
        raise BifocalError(f"'{out}' is a file, and the results need a folder; choose another with --out.")
    for name in ("results.json", "report.html"):
        require_overwritable(out / name, EVALUATION)
    results = measure(models, recipe, out, only or (), mteb or ())
    numbers = summary(results)
    with overwrite(out / "results.json", EVALUATION) as scratch:
        scratch.write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")
    if card:
        for folder, of_model in results.items():
            metrics = [(one.task, one.kind, one.metrics) for one in of_model if one.metrics]
            add_results(Path(folder), metrics, sources_on_hub(recipe))
    write_evaluation_page(results, out / "report.html", f"Evaluation: {recipe.name if recipe else 'MTEB'}")
    if as_json:
        typer.echo(json.dumps(numbers, indent=2))
        return
    for task in zip(*results.values(), strict=True):
        measured = [(model, result) for model, result in zip(results, task, strict=True) if result.metrics]
        reached = "  ".join(f"{model} {result.metrics[result.main]:.3f}" for model, result in measured)
        said = remarks(measured[0][1]) if measured else []
        typer.echo(f"{task[0].task} ({task[0].main}): {reached}" + (f"  ({'; '.join(said)})" if said else ""))
    typer.echo(f"See {out / 'report.html'}.")
