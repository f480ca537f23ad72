"""The commands `train` and `mine`."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bifocal.cli.console import Dtype, FastDecoding, NumWorkers, require, writes_into

if TYPE_CHECKING:
    from bifocal.training.recipe import Recipe


def train(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or the name of a recipe that comes with Bifocal.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value, such as training.max_steps=100 or tasks.pairs.batch_size=64.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan of the run, then exit.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Overwrite an existing run.")] = False,
) -> None:
    """Train one stage by a recipe and export the model. A killed run resumes from its last checkpoint."""
    require("accelerate", "datasets", "pydantic", "sentence_transformers")
    from bifocal.training.recipe import find_recipe, load_recipe
    from bifocal.training.run_folder import require_run_folder, require_start

    path = find_recipe(recipe)
    loaded = load_recipe(path, overrides, files=True, training_values=False)
    writes_into(loaded.folder, "free space and run the command again to resume, or set another output_dir")
    if not dry_run:
        require_run_folder(loaded.folder)
    if dry_run or overwrite or not (loaded.folder / "model" / "config.json").exists():  # a finished run starts nothing
        require_start(loaded)
    loaded = load_recipe(path, overrides, files=True)
    message = _plan(loaded) if dry_run else _train(loaded, overwrite)
    if message:
        typer.echo(message)


def _plan(recipe: "Recipe") -> str:
    from bifocal.training.plan import plan

    return plan(recipe)


def _train(recipe: "Recipe", overwrite: bool) -> str:
    """Run a recipe and export its model; return a line for the user, empty in all processes but the main one.

    A single text tower (stage 0) is saved as such.
    """
    from bifocal.files import RUN
    from bifocal.hub.card import Card, TrainedStage
    from bifocal.hub.export import export_model
    from bifocal.hub.source_card import as_data, common_license, sources_of_start
    from bifocal.training.engine.distributed import ProcessGroupInfo, leave_process_group
    from bifocal.training.run_folder import start_paths
    from bifocal.training.runner import run_recipe
    from bifocal.training.stage_record import STAGE, earlier_stages

    def save(model: Any, processor: Any, folder: Path) -> None:
        facts = [*earlier_stages(recipe), json.loads((recipe.folder / STAGE).read_text(encoding="utf-8"))]
        sources = sources_of_start(start_paths(recipe))
        card = Card(
            name=recipe.name,
            license=common_license(sources),
            sources=as_data(sources),
            description=f"A Bifocal model trained by the recipe '{recipe.name}'.",
            stages=[TrainedStage(**stage) for stage in facts],
        )
        export_model(model, folder, processor, card, kind=RUN)

    folder = run_recipe(recipe, save, overwrite)
    is_main = ProcessGroupInfo.current().is_main
    leave_process_group()
    if not is_main:
        return ""
    if folder is None:
        return f"This run is finished; see {recipe.folder / 'model'}. To train again, add --overwrite."
    return f"The model is in {folder}."


def mine(
    source: Annotated[str, typer.Argument(help="A file, folder or Hub id with queries and positives, or images.")],
    out: Annotated[Path, typer.Argument(help="Parquet file to write.")],
    model: Annotated[
        str, typer.Option(help="Any model that embeds texts; across modalities, a Bifocal, CLIP or SigLIP model.")
    ],
    direction: Annotated[str, typer.Option(help="text-to-text, text-to-image or image-to-text.")] = "text-to-text",
    column_mapping: Annotated[
        list[str] | None, typer.Option(help="Rename a column of the source, as in question=query.")
    ] = None,
    num_negatives: Annotated[int, typer.Option(min=1, help="Negatives per query.")] = 7,
    range_min: Annotated[int, typer.Option(min=0, help="Skip this many of the closest candidates.")] = 0,
    range_max: Annotated[int, typer.Option(min=1, help="Consider only this many of the closest candidates.")] = 100,
    absolute_margin: Annotated[
        float | None, typer.Option(help="Smallest difference in similarity between the positive and a negative.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts or images per forward pass.")] = 64,
    cache: Annotated[Path | None, typer.Option(help="Folder for embeddings, with which a killed run resumes.")] = None,
    dtype: Dtype = "model",
    num_workers: NumWorkers = None,
    fast_decoding: FastDecoding = False,
) -> None:
    """Mine hard negatives for text pairs, or across images and texts, and write them with their scores."""
    require("datasets", "pydantic", "sentence_transformers")
    from bifocal.training.mine_source import mine_source

    settings = dict(
        num_negatives=num_negatives, range_min=range_min, range_max=range_max, absolute_margin=absolute_margin,
        batch_size=batch_size, num_workers=num_workers, fast_decoding=fast_decoding,
    )  # fmt: skip
    writes_into(out.parent)
    typer.echo(mine_source(source, out, model, direction, column_mapping or [], cache, settings, dtype))
