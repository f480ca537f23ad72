"""Run a recipe: load its data and model, train or resume, and keep its settings and results in the run's folder."""

import json
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml
from transformers import TrainerCallback, set_seed
from transformers.trainer_callback import ProgressCallback

from bifocal.data.augmentation import ImageAugmentation
from bifocal.data.loading import load_source
from bifocal.data.skips import SkipLog
from bifocal.data.symbols import random_shift
from bifocal.errors import RecipeError, TrainingError
from bifocal.files import (
    RUN,
    NotOursError,
    require_overwritable,
    require_replaceable,
    write_json,
)
from bifocal.files import overwrite as overwrite_file
from bifocal.modeling import BifocalProcessor
from bifocal.progress import no_progress_bars
from bifocal.training.arguments import BifocalTrainingArguments
from bifocal.training.builders import (
    add_lora,
    load_processor,
    load_start,
    loading_log,
    new_model,
    require_device,
    training_arguments,
)
from bifocal.training.callbacks.stopwatch import Stopwatch, training_seconds
from bifocal.training.checkpoints import checkpoints, clear_run, last_complete_checkpoint
from bifocal.training.engine.distributed import ProcessGroupInfo, on_main_process
from bifocal.training.mlm import train_mlm
from bifocal.training.precision import DTYPES, PRECISION, begun_precision, precision_title
from bifocal.training.recipe import Recipe, TaskRecipe
from bifocal.training.run_folder import RESOLVED, require_run_folder
from bifocal.training.stage_record import STAGE, stage_facts, write_stage
from bifocal.training.tasks import Task
from bifocal.training.trainer import MultiTaskTrainer

VERSIONS = "versions.json"
RUN_FILES = (RESOLVED, VERSIONS, PRECISION, STAGE)


@dataclass
class Prepared:
    """A recipe whose data, model and trainer are ready."""

    recipe: Recipe
    tasks: list[Task]
    processor: BifocalProcessor
    trainer: MultiTaskTrainer


def prepare(
    recipe: Recipe,
    callbacks: Sequence[Any] = (),
    load: Callable[..., Any] = load_source,
    arguments: BifocalTrainingArguments | None = None,
    **changes: Any,
) -> Prepared:
    """Load the data and the model of a recipe with tasks, and build its trainer.

    Args:
        callbacks: further callbacks of the trainer.
        load: function that reads a `Source`, with the arguments of `load_source`.
        arguments: result of `training_arguments`, if there is one already.
        changes: training arguments that override the recipe's, such as `disable_tqdm`.

    Raises:
        RecipeError: if something the recipe names does not exist or does not fit.
    """
    require_device(recipe)
    # Before loading: under torchrun the arguments start the process group, and the first process prepares data alone.
    arguments = arguments or training_arguments(recipe, **changes)
    with arguments.main_process_first(desc="loading data"):
        skipped = SkipLog(loading_log(recipe))
        tasks = recipe_tasks(recipe, recipe.tasks, load, skipped)
        eval_tasks = recipe_tasks(recipe, recipe.eval_tasks, load, skipped)
        set_seed(recipe.seed)  # two towers get new heads
        model = load_start(recipe)
        processor = load_processor(recipe, tasks, model)
    if model is None:
        set_seed(recipe.seed)
        model = new_model(recipe, processor)
    try:
        model.processor = processor
    except ValueError as error:  # a tokenizer of another model
        raise RecipeError(f"Recipe '{recipe.name}': {error}") from error
    if recipe.lora is not None:
        model = add_lora(recipe, model)
    try:
        trainer = MultiTaskTrainer(
            model, arguments, tasks, processor, recipe.max_length, eval_tasks,
            _augmentation(recipe), list(callbacks),
        )  # fmt: skip
    except TrainingError:
        raise
    except (ValueError, ImportError) as error:  # the Trainer's own checks of its arguments
        raise RecipeError(f"Recipe '{recipe.name}', training: {error}") from error
    return Prepared(recipe, list(trainer.tasks.values()), processor, trainer)


def _augmentation(recipe: Recipe) -> Any:
    if recipe.augment is None or isinstance(recipe.augment, str):
        return None if recipe.augment is None else random_shift
    return ImageAugmentation(**recipe.augment.model_dump())


def recipe_tasks(
    recipe: Recipe, task_recipes: Sequence[TaskRecipe], load: Callable[..., Any], skipped: SkipLog
) -> list[Task]:
    """Load the data of tasks of a recipe, a task for each corpus of a mixture.

    Args:
        load: function that reads a `Source`, with the arguments of `load_source`.
        skipped: log that counts and lists skipped rows.

    Raises:
        RecipeError: if a source cannot be read, or a task does not fit it.
    """
    tasks = []
    for item in (task for recipe_task in task_recipes for task in recipe_task.expanded()):
        options = item.model_dump(exclude={"data", "mixture"})
        try:
            data = load(item.source, item.kind, recipe.seed, skipped, item.name)
            tasks.append(Task(dataset=data, max_bad_fraction=item.source.max_bad_fraction, **options))
        except ValueError as error:
            raise RecipeError(f"Recipe '{recipe.name}', task '{item.name}': {error}") from error
    return tasks


def open_run(recipe: Recipe, overwrite: bool = False, precision: str | None = None) -> bool:
    """Claim the run's folder and write the resolved recipe and the versions into it; return False if it is finished.

    Args:
        overwrite: remove an earlier run in the folder.
        precision: mixed precision that the run trains in, which is written, too.

    Raises:
        RecipeError: if the folder holds other files, a run of another recipe, or (with `overwrite`) files of the run
            that somebody changed.
    """
    folder = recipe.folder
    wanted = json.loads(recipe.model_dump_json())
    require_run_folder(folder)
    kept = folder / RESOLVED
    trained = bool(checkpoints(folder)) or (folder / "model").exists()
    try:
        if kept.exists():
            changed = sorted(_changes(_resolved(kept), wanted))
            if overwrite or (changed and not trained):
                clear_run(folder, *RUN_FILES)
            elif changed:
                raise RecipeError(
                    f"'{folder}' holds a run of this recipe with other values of {', '.join(changed[:5])}. Set another "
                    "output_dir, or add --overwrite."
                )
            elif (folder / "model" / "config.json").exists():
                return False
            elif not trained:  # its tokenizer is trained again, since the data may have changed
                clear_run(folder)
        require_replaceable(folder / "model", RUN)  # now, and not after the training
        for name in (STAGE, VERSIONS, PRECISION):
            require_overwritable(folder / name, RUN)
    except NotOursError as error:
        raise RecipeError(str(error)) from error
    # The folder is new, cleared, or holds the same recipe.
    with overwrite_file(folder / VERSIONS, RUN) as scratch:
        write_json(scratch, versions())
    if precision is not None:
        with overwrite_file(folder / PRECISION, RUN) as scratch:
            write_json(scratch, {"mixed_precision": precision})
    if not kept.exists():  # a recipe that is there says the same, maybe with comments of the user's
        with overwrite_file(kept, RUN) as scratch:
            scratch.write_text(yaml.safe_dump(wanted, sort_keys=False), encoding="utf-8")
    return True


def _resolved(path: Path) -> dict[str, Any]:
    """Return the recipe in a file; empty if it holds none."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        return {}
    return values if isinstance(values, dict) else {}


def _changes(old: Any, new: Any, name: str = "") -> list[str]:
    """Return the dotted keys whose values differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = old.keys() | new.keys()
        return [c for key in keys for c in _changes(old.get(key), new.get(key), f"{name}.{key}".strip("."))]
    return [] if old == new else [name]


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that a result depends on."""
    installed = {"python": platform.python_version(), "platform": platform.platform()}
    for package in ("bifocal", "torch", "transformers", "datasets", "accelerate", "tokenizers", "peft"):
        try:
            installed[package] = version(package)
        except PackageNotFoundError:
            continue
    return installed


def run_recipe(
    recipe: Recipe,
    save: Callable[[Any, BifocalProcessor, Path], Any],
    overwrite: bool = False,
    load: Callable[..., Any] = load_source,
    progress: TrainerCallback | None = None,
) -> Path | None:
    """Train as the recipe says, resuming from the last checkpoint if there is one, and save into its folder's `model`.

    Args:
        save: function that writes a model and its processor into a folder, whole or not at all. The folder's
            `stage.json` (`stage_facts`) is already in it.
        overwrite: remove an earlier run in the folder.
        load: function that reads a `Source`, with the arguments of `load_source`.
        progress: replaces the Trainer's progress bar.

    Returns:
        The model's folder; None if the run was finished before.

    Raises:
        RecipeError: if something the recipe names does not exist, or the folder holds something else.
    """
    require_device(recipe)
    begun = None if overwrite else begun_precision(recipe.folder, recipe.training, recipe.device)
    arguments = training_arguments(recipe, begun)  # under torchrun this starts the process group
    if not on_main_process(lambda: open_run(recipe, overwrite, arguments.mixed_precision)):
        return None
    if ProcessGroupInfo.current().is_main:
        print(f"'{recipe.name}' trains in {precision_title(arguments)}.")
    if recipe.mlm is not None:
        return train_mlm(recipe, arguments)
    prepared = prepare(recipe, [Stopwatch()], load, arguments)
    trainer = prepared.trainer
    if progress is not None:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(progress)
    checkpoint = last_complete_checkpoint(recipe.folder)
    if checkpoint is not None and ProcessGroupInfo.current().is_main:
        print(f"'{recipe.name}' resumes from {checkpoint.name}.")
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    model = trainer.accelerator.unwrap_model(trainer.model)
    if hasattr(model, "merge_and_unload"):
        trainer.model = trainer.model_wrapped = model = model.merge_and_unload()
    if arguments.save_dtype is not None:  # before it is measured
        model.to(DTYPES[arguments.save_dtype])
    if recipe.eval_tasks:
        trainer.evaluate()
    folder = recipe.folder / "model"
    if trainer.is_world_process_zero():
        write_stage(recipe.folder, stage_facts(prepared, training_seconds(trainer), versions()))
        with no_progress_bars():
            save(model, prepared.processor, folder)
    trainer.accelerator.wait_for_everyone()
    return folder
