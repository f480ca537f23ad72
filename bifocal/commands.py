"""The commands `train` and `mine`: from what is typed to the functions that do it."""

import json
import tempfile
from pathlib import Path
from typing import Any

from bifocal.errors import model_not_loaded
from bifocal.files import RUN, require_overwritable
from bifocal.training.recipe import Recipe
from bifocal.training.tasks import COLUMNS


def train(recipe: Recipe, force: bool) -> str:
    """Carry out a recipe and export its model; returns what there is to say.

    A model that is a single text tower (stage 0) is saved as such. Of several processes only the main one speaks.
    """
    from bifocal.hub.card import Card, TrainedStage
    from bifocal.hub.export import export_model
    from bifocal.training.distributed import World
    from bifocal.training.history import STAGE, earlier_stages
    from bifocal.training.run import run_recipe

    def save(model: Any, processor: Any, folder: Path) -> None:
        facts = [*earlier_stages(recipe), json.loads((recipe.folder / STAGE).read_text(encoding="utf-8"))]
        card = Card(
            name=recipe.name,
            description=f"A Bifocal model trained by the recipe '{recipe.name}'.",
            stages=[TrainedStage(**stage) for stage in facts],
        )
        export_model(model, folder, processor, card, kind=RUN)

    folder = run_recipe(recipe, save, force)
    if not World.current().is_main:
        return ""
    if folder is None:
        return f"This run is finished; see {recipe.folder / 'model'}. To train again, add --force."
    return f"The model is in {folder}."


def plan(recipe: Recipe) -> str:
    """What a run would do: data, batches, steps, parameters, memory. Loads the data and makes the model."""
    from transformers import SchedulerType

    from bifocal.training.chunk_size import kept_per_row
    from bifocal.training.parameters import not_trained, parameter_groups, without_gradient
    from bifocal.training.run import prepare

    if recipe.mlm is not None:
        settings, rows = recipe.training, recipe.mlm.batch_size
        long = (
            f"{settings['max_steps']:,} steps"
            if "max_steps" in settings
            else f"{settings['num_train_epochs']:g} epochs"
        )
        return (
            f"Recipe '{recipe.name}': masked language modelling, {recipe.mlm.probability:.0%} of the tokens\n"
            f"data     {recipe.mlm.data.path}\n"
            f"length   {long}, {rows} texts of up to {recipe.max_length} tokens a step"
        )
    with tempfile.TemporaryDirectory() as scratch:  # the Trainer makes its folder; a plan leaves none
        prepared = prepare(recipe.model_copy(update={"output_dir": scratch}), disable_tqdm=True)
    trainer, args = prepared.trainer, prepared.trainer.args
    schedule = trainer.step_batches.schedule
    lines = [f"Recipe '{recipe.name}', from {_start(recipe)}, into {recipe.folder}", "", "data"]
    for task in prepared.tasks:
        share = schedule.shares[task.name]
        size = task.size
        passes = "" if not size else f", {args.max_steps * share * task.batch_size * args.world_size / size:.2f} passes"
        many = "streamed" if size is None else f"{size:,} rows"
        lines.append(
            f"  {task.name}: {task.kind} ({', '.join(COLUMNS[task.kind])}), {many}, {task.batch_size} a batch, "
            f"{share:.0%} of the {task.sort} batches{passes}, {task.loss} times {task.loss_weight:g}"
        )
    lines += [
        "",
        f"steps    {args.max_steps:,}, warm-up {args.get_warmup_steps(args.max_steps):,}, "
        f"{SchedulerType(args.lr_scheduler_type).value}",
    ]
    lines += ["", "parameters"]
    model = trainer.model
    with not_trained(model, without_gradient(model, prepared.tasks)):
        for group in parameter_groups(model, args):
            count = sum(parameter.numel() for parameter in group["params"])
            lines.append(f"  {count:>12,}  learning rate {group['lr']:g}, weight decay {group['weight_decay']:g}")
        frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
        trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    if frozen:
        lines.append(f"  {frozen:>12,}  frozen, or reached by no task")
    whole = sum(p.numel() * p.element_size() for p in model.parameters())
    per_text, per_image = kept_per_row(model, trainer.max_length, prepared.processor, args)
    lines += [
        "",
        "memory (estimated)",
        f"  {(whole + 3 * trained) / 2**30:.2f} GiB  weights, gradients and two optimiser states",
        f"  {per_text / 2**20:.1f} MiB  a text of {trainer.max_length} tokens embedded with gradients",
        f"  {per_image / 2**20:.1f} MiB  an image",
    ]
    if args.auto_chunk:
        lines.append("  auto_chunk will embed as many at once as fit")
    return "\n".join(lines)


def _start(recipe: Recipe) -> str:
    start = recipe.start_from
    if start is None:
        return "nothing"
    if isinstance(start, str):
        return start
    return f"stage {start.stage}" if start.stage else f"{start.text} and {start.image}"


def mine(
    source: str, out: Path, model: str, direction: str, columns: list[str], cache: Path | None, settings: dict[str, Any]
) -> str:
    """Mine hard negatives for a source and write them as Parquet; returns what there is to say."""
    from bifocal.training import mining
    from bifocal.training.recipe import RecipeError, Source
    from bifocal.training.sources import load_source

    require_overwritable(out, mining.MINED)  # now, and not after hours of mining
    renamed = {}
    for column in columns:
        ours, equals, theirs = column.partition("=")
        if not equals:
            raise RecipeError(f"'{column}' is no column; write ours=theirs, such as query=question.")
        renamed[ours] = theirs
    if direction not in mining.DIRECTIONS:
        raise mining.MiningError(f"direction must be one of {', '.join(mining.DIRECTIONS)}, but it is '{direction}'.")
    if out.is_dir():
        raise mining.MiningError(f"'{out}' is a folder. Give the Parquet file to write.")
    kind = "text-pair" if direction == "text-to-text" else "image-text"
    data = load_source(Source(path=source, columns=renamed), kind)
    chosen = mining.MiningSettings(**settings)
    if direction == "text-to-text":
        mined = mining.mine_texts(data, _load_model(model, across=False), chosen, cache)
    else:
        cache = cache or out.with_suffix(".cache")
        mined = mining.mine_across(data, _load_model(model, across=True), direction, cache, chosen)
    mining.write_parquet(mined, out)
    return f"{len(mined)} of {len(data)} rows have {chosen.negatives} negatives; they are in {out}."


def _load_model(place: str, across: bool) -> Any:
    """A Bifocal model to mine across modalities, or any sentence-transformers model for texts.

    Raises:
        MiningError: if there is no such model.
    """
    from sentence_transformers import SentenceTransformer

    from bifocal.modeling import BifocalModel
    from bifocal.training.mining import MiningError
    from bifocal.training.progress_bars import no_progress_bars

    try:
        with no_progress_bars():
            return BifocalModel.from_pretrained(place) if across else SentenceTransformer(place)
    except (OSError, ValueError) as error:
        wanted = "Bifocal model" if across else "sentence-transformers model"
        raise MiningError(model_not_loaded(place, error, wanted)) from error
