"""The commands `train` and `mine`."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bifocal.cli.console import require, writes_into

if TYPE_CHECKING:
    from bifocal.training.recipe import Recipe


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
    from bifocal.training.plan import plan
    from bifocal.training.recipe import find_recipe, load_recipe

    loaded = load_recipe(find_recipe(recipe), overrides, files=True)
    writes_into(loaded.folder, "free space and run the command again to resume, or set another output_dir")
    message = plan(loaded) if dry_run else _train(loaded, force)
    if message:
        typer.echo(message)


def _train(recipe: "Recipe", force: bool) -> str:
    """Carry out a recipe and export its model; returns what there is to say.

    A model that is a single text tower (stage 0) is saved as such. Of several processes only the main one speaks.
    """
    from bifocal.files import RUN
    from bifocal.hub.card import Card, TrainedStage
    from bifocal.hub.export import export_model
    from bifocal.training.engine.distributed import ProcessGroupInfo
    from bifocal.training.runner import run_recipe
    from bifocal.training.stage_record import STAGE, earlier_stages

    def save(model: Any, processor: Any, folder: Path) -> None:
        facts = [*earlier_stages(recipe), json.loads((recipe.folder / STAGE).read_text(encoding="utf-8"))]
        card = Card(
            name=recipe.name,
            description=f"A Bifocal model trained by the recipe '{recipe.name}'.",
            stages=[TrainedStage(**stage) for stage in facts],
        )
        export_model(model, folder, processor, card, kind=RUN)

    folder = run_recipe(recipe, save, force)
    if not ProcessGroupInfo.current().is_main:
        return ""
    if folder is None:
        return f"This run is finished; see {recipe.folder / 'model'}. To train again, add --force."
    return f"The model is in {folder}."


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
    from bifocal.training.mine_source import mine_source

    settings = dict(negatives=negatives, skip=skip, depth=depth, margin=margin, batch_size=batch_size)
    writes_into(out.parent)
    typer.echo(mine_source(source, out, model, direction, column or [], cache, settings))
