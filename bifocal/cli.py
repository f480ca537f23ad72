"""The `bifocal` command."""

from pathlib import Path
from typing import Annotated

import typer

from bifocal import claims_command, hub_commands, search_commands
from bifocal.console import cannot_write, fail, one_sentence, require
from bifocal.data_commands import data

app = typer.Typer(
    name="bifocal",
    help=(
        "One model for image search and text search.\n\n"
        "Bifocal trains, evaluates and publishes models that embed pictures and texts into one space, in the three "
        "stages of Jina CLIP (arXiv 2405.20204)."
    ),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


app.add_typer(data)


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
    """Keeps `bifocal COMMAND` the form of every call, however few commands there are."""


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder of the run; a killed run there goes on.")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(help="Of the split, the weights and the order of the batches.")] = 0,
    quick: Annotated[
        bool, typer.Option("--quick", help="Seconds instead of minutes; too short to learn much.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Start anew where a run is already.")] = False,
) -> None:
    """Train a small model through the three stages, search with it and write a report."""
    require("accelerate", "datasets", "fontTools", "jinja2", "matplotlib", "sentence_transformers")
    from bifocal.demo import DemoError, full_settings, quick_settings, run_demo
    from bifocal.files import NotOursError

    try:
        run_demo(out, quick_settings(seed) if quick else full_settings(seed), force)
    except (DemoError, NotOursError) as error:
        fail(str(error))
    except Exception as error:
        if not cannot_write(error, out):
            raise
        fail(f"Cannot write to {out} ({error}); free space or choose another --out. The run goes on from there.")


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or the name of a recipe that comes with Bifocal.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value, such as training.max_steps=100 or tasks.pairs.batch_size=64.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be done, and stop.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Start anew where a run is already.")] = False,
) -> None:
    """Carry out a recipe: train one stage, from its last checkpoint if it was killed, and export the model."""
    require("accelerate", "datasets", "pydantic", "sentence_transformers")
    from bifocal import commands
    from bifocal.training.recipe import find_recipe, load_recipe

    with one_sentence(Path()):
        loaded = load_recipe(find_recipe(recipe), overrides, files=True)
    with one_sentence(loaded.folder, "free space or set another output_dir; the run goes on from there"):
        message = commands.plan(loaded) if dry_run else commands.train(loaded, force)
        if message:
            typer.echo(message)


@app.command()
def mine(
    source: Annotated[str, typer.Argument(help="A file, folder or Hub id with queries and positives, or images.")],
    out: Annotated[Path, typer.Argument(help="Parquet file to write.")],
    model: Annotated[str, typer.Option(help="A sentence-transformers model; a Bifocal model across modalities.")],
    direction: Annotated[str, typer.Option(help="text-to-text, text-to-image or image-to-text.")] = "text-to-text",
    column: Annotated[list[str] | None, typer.Option(help="ours=theirs, such as query=question.")] = None,
    negatives: Annotated[int, typer.Option(min=1, help="How many for each query.")] = 7,
    skip: Annotated[int, typer.Option(min=0, help="Leave out the first so many candidates.")] = 0,
    depth: Annotated[int, typer.Option(min=1, help="Look at so many candidates.")] = 100,
    margin: Annotated[
        float | None, typer.Option(help="A negative is at least so much less similar than the positive.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts or images per forward pass.")] = 64,
    cache: Annotated[Path | None, typer.Option(help="Folder for embeddings; a killed run finds them again.")] = None,
) -> None:
    """Find hard negatives for text pairs, or across pictures and texts, and write them with their scores."""
    require("datasets", "pydantic", "sentence_transformers")
    from bifocal import commands

    settings = dict(negatives=negatives, skip=skip, depth=depth, margin=margin, batch_size=batch_size)
    with one_sentence(out.parent):
        typer.echo(commands.mine(source, out, model, direction, column or [], cache, settings))


@app.command()
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

    from bifocal.evaluate import evaluate as measure
    from bifocal.evaluate import load_evaluation_recipe, write_cards
    from bifocal.evaluation.evaluation_page import EVALUATION, remarks, summary, write_evaluation_page
    from bifocal.files import overwrite, require_overwritable

    with one_sentence(out, "free space or choose another --out; it goes on from there"):
        recipe = None if suite is None and mteb else load_evaluation_recipe(suite or "symbols")
        if out.exists() and not out.is_dir():
            fail(f"'{out}' is a file, and the results need a folder; choose another with --out.")
        for name in ("results.json", "report.html"):
            require_overwritable(out / name, EVALUATION)
        results = measure(models, recipe, out, only or (), mteb or ())
        numbers = summary(results)
        with overwrite(out / "results.json", EVALUATION) as scratch:
            scratch.write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")
        if card:
            write_cards(results, recipe)
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


for command in (
    hub_commands.convert, hub_commands.export, hub_commands.push, search_commands.index, search_commands.search,
    search_commands.remove, search_commands.database, search_commands.serve, claims_command.claims,
):  # fmt: skip
    app.command()(command)


@app.command()
def version() -> None:
    """Print the version."""
    _print_version(True)


def main() -> None:
    app()
