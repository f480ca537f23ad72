"""Carrying out a recipe: load, train, and keep all that is needed to go on or to do it again."""

import json
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers.utils import logging

from bifocal.data.kinds import COLUMNS
from bifocal.data.loading import load_source
from bifocal.data.skips import SkipLog, start_log
from bifocal.errors import RecipeError, TrainingError, first_line
from bifocal.files import (
    MARKER,
    RUN,
    NotOursError,
    record,
    replace_file,
    replace_folder,
    require_replaceable,
    write_json,
)
from bifocal.modeling import BifocalConfig, BifocalModel, BifocalProcessor, BifocalTextModel, BifocalVisionModel
from bifocal.progress import no_progress_bars
from bifocal.training.arguments import BifocalTrainingArguments
from bifocal.training.callbacks.bookkeeping import Stopwatch, seconds_of
from bifocal.training.checkpoints import checkpoints, clear_run, last_complete_checkpoint
from bifocal.training.engine.distributed import World
from bifocal.training.precision import DTYPES
from bifocal.training.recipe import Recipe, StartFrom
from bifocal.training.stage_record import stage_facts, write_stage
from bifocal.training.tasks import Task
from bifocal.training.trainer import MultiTaskTrainer

logger = logging.get_logger(__name__)
RESOLVED = "recipe.yaml"


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
    """Load everything a recipe of tasks names.

    Args:
        load: reads a `Source`, as `load_source` does.
        arguments: those of `training_arguments`, if they are made already.
        changes: training arguments that the recipe does not decide, such as `disable_tqdm`.

    Raises:
        RecipeError: what the recipe asks for is not here.
    """
    from transformers import set_seed

    require_device(recipe)
    # Before loading: under torchrun the arguments start the process group, and the first process prepares data alone.
    arguments = arguments or training_arguments(recipe, **changes)
    with arguments.main_process_first(desc="loading data"):
        skipped = SkipLog(fresh_log(recipe))
        tasks = _tasks(recipe, recipe.tasks, load, skipped)
        eval_tasks = _tasks(recipe, recipe.eval_tasks, load, skipped)
        processor = load_processor(recipe, tasks)
    set_seed(recipe.seed)
    model = load_model(recipe, processor)
    model.processor = processor
    if recipe.lora is not None:
        model = _with_lora(recipe, model)
    from bifocal.data.symbols import random_shift

    try:
        trainer = MultiTaskTrainer(
            model, arguments, tasks, processor, recipe.max_length, eval_tasks,
            random_shift if recipe.augment == "shift" else None, list(callbacks),
        )  # fmt: skip
    except TrainingError:
        raise
    except (ValueError, ImportError) as error:  # what the Trainer itself finds in its arguments
        raise RecipeError(f"Recipe '{recipe.name}', training: {error}") from error
    return Prepared(recipe, tasks, processor, trainer)


def training_arguments(recipe: Recipe, **changes: Any) -> BifocalTrainingArguments:
    settings = {"report_to": "none", "save_total_limit": 2, "logging_steps": 10, **recipe.training, **changes}
    settings |= {"output_dir": str(recipe.folder), "seed": recipe.seed, "restore_callback_states_from_checkpoint": True}
    if recipe.mlm is not None:
        settings["per_device_train_batch_size"] = recipe.mlm.batch_size
    half = False
    if recipe.device == "cpu" or not torch.accelerator.is_available():
        settings["use_cpu"] = True
        half = bool(settings.get("bf16") or settings.get("fp16"))
        settings |= {"bf16": False, "fp16": False}
    try:
        arguments = BifocalTrainingArguments(**settings)
    except (ValueError, TypeError) as error:
        raise RecipeError(f"Recipe '{recipe.name}', training: {error}") from error
    if half and arguments.process_index == 0:
        logger.warning("Half precision is off: recipes train in float32 on a CPU.")
    return arguments


def require_device(recipe: Recipe) -> None:
    if recipe.device == "cuda" and not torch.cuda.is_available():
        raise RecipeError(f"Recipe '{recipe.name}' asks for CUDA, and this machine has none; set device=cpu or auto.")


def fresh_log(recipe: Recipe) -> Path | None:
    """Where rows that are left out while loading are named; anew each time, since all are read again."""
    if not recipe.folder.exists() or World.current().rank:
        return None
    return start_log(recipe.folder / "skipped-loading.jsonl")


def _tasks(recipe: Recipe, given: Sequence[Any], load: Callable[..., Any], skipped: SkipLog) -> list[Task]:
    tasks = []
    for item in given:
        options = item.model_dump(exclude={"data"})
        try:
            data = load(item.data, item.kind, recipe.seed, skipped, item.name)
            tasks.append(Task(dataset=data, max_bad=item.data.max_bad_fraction, **options))
        except ValueError as error:
            raise RecipeError(f"Recipe '{recipe.name}', task '{item.name}': {error}") from error
    return tasks


def load_processor(recipe: Recipe, tasks: Sequence[Task]) -> BifocalProcessor:
    """The recipe's, or that of what it starts from, or one whose tokenizer is trained here; with this stage's sizes.

    A tokenizer trained here is kept in the run's folder, so that a resumed run has the same.
    """
    kept = recipe.folder / "processor"
    source = recipe.processor or (None if recipe.start_from is None else _place(recipe, "text"))
    if kept.exists():
        processor = BifocalProcessor.from_pretrained(kept)
    elif recipe.train_tokenizer is not None:
        processor = _new_processor(recipe, tasks)
    elif source is not None:
        processor = _saved_processor(recipe, source)
    else:
        raise RecipeError(f"Recipe '{recipe.name}' starts from nothing; name a processor, or train_tokenizer.")
    if recipe.image_size is not None:
        side = recipe.image_size
        processor.image_processor.size = {"shortest_edge": side}
        processor.image_processor.crop_size = {"height": side, "width": side}
    if not kept.exists() and World.current().rank == 0 and recipe.folder.exists():
        with replace_folder(kept, RUN) as made:
            processor.save_pretrained(made)
    return processor


def _saved_processor(recipe: Recipe, source: str) -> BifocalProcessor:
    """A Bifocal processor, or any WordPiece tokenizer with the image processor of the towers."""
    from transformers import AutoTokenizer

    try:
        if not Path(source).exists() or (Path(source) / "processor_config.json").exists():
            try:
                return BifocalProcessor.from_pretrained(source)
            except (OSError, ValueError, TypeError):
                if Path(source).exists():
                    raise
        return _with_images(recipe, AutoTokenizer.from_pretrained(source))
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"Recipe '{recipe.name}': there is no processor at '{source}' ({first_line(error)})."
        ) from error


def _with_images(recipe: Recipe, tokenizer: Any) -> BifocalProcessor:
    from transformers.models.clip import CLIPImageProcessorPil

    side = recipe.image_size or 224
    images = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    return BifocalProcessor(images, tokenizer)


def _new_processor(recipe: Recipe, tasks: Sequence[Task]) -> BifocalProcessor:
    from bifocal.training.tokenizer import train_wordpiece

    texts: list[str] = []
    for task in tasks:
        for column in COLUMNS[task.kind]:
            if column != "image":
                for value in task.dataset.select_columns([column])[column]:
                    texts += value if isinstance(value, list) else [value]
    assert recipe.train_tokenizer is not None
    # Each text once: a tokenizer is a function of the texts, whatever tasks they come from.
    tokenizer = train_wordpiece(sorted(set(texts)), recipe.train_tokenizer, recipe.max_length)
    return _with_images(recipe, tokenizer)


def _place(recipe: Recipe, tower: str) -> str:
    """Folder or Hub id that a recipe starts from.

    Raises:
        RecipeError: the stage before has not been trained.
    """
    start = recipe.start_from
    if isinstance(start, str):
        return start
    assert start is not None
    if start.stage is not None:
        folder = Path("runs") / start.stage / "model"
        if not (folder / "config.json").exists():
            raise RecipeError(
                f"Recipe '{recipe.name}' starts from stage '{start.stage}', of which there is no {folder}; run "
                f"bifocal train {start.stage} first."
            )
        return str(folder)
    place = getattr(start, tower)
    if place is None:
        raise RecipeError(f"Recipe '{recipe.name}', start_from: give a stage, or both text and image.")
    return place


def load_model(recipe: Recipe, processor: BifocalProcessor) -> BifocalModel:
    """A new model of the recipe's size, or what it starts from.

    Raises:
        RecipeError: sizes that do not go together, or nothing to load.
    """
    start = recipe.start_from
    dtype = DTYPES.get(recipe.training.get("master_dtype", "float32"))
    try:
        if start is None:
            settings = {key: value for key, value in recipe.model.items() if key != "text_config"}
            tokens = -(-len(processor.tokenizer) // 64) * 64
            text = {"vocab_size": tokens, **recipe.model.get("text_config", {})}
            return BifocalModel(BifocalConfig(text_config=text, **settings))
        if isinstance(start, StartFrom) and start.stage is None:
            with no_progress_bars():
                text_tower: Any = BifocalTextModel.from_pretrained(_place(recipe, "text"), dtype=dtype)
                image_tower: Any = BifocalVisionModel.from_pretrained(_place(recipe, "image"), dtype=dtype)
            config = BifocalConfig(text_config=text_tower.config, vision_config=image_tower.config, **recipe.model)
            model = BifocalModel(config)
            model.text_model.load_state_dict(text_tower.state_dict())
            model.vision_model.load_state_dict(image_tower.state_dict())
            return model
        place = _place(recipe, "text")
        saved = BifocalConfig.from_pretrained(place)
        # A saved config may hold keys that nobody knows, a recipe may not.
        BifocalConfig(**{key: value for key, value in recipe.model.items() if not hasattr(saved, key)})
        changed = BifocalConfig.from_pretrained(place, **recipe.model)
        with no_progress_bars():
            return BifocalModel.from_pretrained(place, config=BifocalConfig(**changed.to_dict()), dtype=dtype)
    except (OSError, TypeError, ValueError) as error:
        if isinstance(error, RecipeError):
            raise
        raise RecipeError(f"Recipe '{recipe.name}', model: {error}") from error


def _with_lora(recipe: Recipe, model: BifocalModel) -> Any:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise RecipeError(f"Recipe '{recipe.name}' has lora, which needs peft; pip install peft.") from error
    assert recipe.lora is not None
    processor = model.processor
    settings = recipe.lora
    config = LoraConfig(
        r=settings.r, lora_alpha=settings.alpha, lora_dropout=settings.dropout,
        target_modules=list(settings.target_modules),
    )  # fmt: skip
    adapted = get_peft_model(model, config)
    model.processor = processor
    return adapted


def open_run(recipe: Recipe, force: bool) -> bool:
    """Claim the run's folder and write the resolved recipe and the versions into it; False if it is finished.

    Raises:
        RecipeError: the folder holds something else, or a run of another recipe.
    """
    folder = recipe.folder
    wanted = json.loads(recipe.model_dump_json())
    if folder.exists() and not folder.is_dir():
        raise RecipeError(f"'{folder}' is a file; set another output_dir.")
    kept = folder / RESOLVED
    if folder.exists() and any(path.name != MARKER for path in folder.iterdir()) and not kept.exists():
        raise RecipeError(f"'{folder}' holds other files and no run; set another output_dir.")
    try:
        if kept.exists():
            changed = sorted(_changes(_resolved(kept), wanted))
            trained = bool(checkpoints(folder)) or (folder / "model").exists()
            if force or (changed and not trained):
                clear_run(folder, RESOLVED)
            elif changed:
                raise RecipeError(
                    f"'{folder}' holds a run of this recipe with other values of {', '.join(changed[:5])}; set another "
                    "output_dir, or start anew with --force."
                )
            elif (folder / "model" / "config.json").exists():
                return False
            elif not trained:  # a tokenizer that was trained there is trained again, since the data may have changed
                clear_run(folder)
        require_replaceable(folder / "model", RUN)  # now, and not after the training
    except NotOursError as error:
        raise RecipeError(str(error)) from error
    # What is here now is a run's folder: new, cleared, or with the very recipe that would be written.
    write_json(folder / "versions.json", versions())
    with replace_file(kept) as scratch:
        scratch.write_text(yaml.safe_dump(wanted, sort_keys=False), encoding="utf-8")
    record(folder, RUN, RESOLVED, "versions.json")
    return True


def _resolved(path: Path) -> dict[str, Any]:
    """The recipe that is there, empty if it is none."""
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        return {}
    return found if isinstance(found, dict) else {}


def _open_together(recipe: Recipe, force: bool) -> bool:
    """`open_run` by the first process, with what came of it for all."""
    world = World.current()
    result: list[Any] = [None]
    if world.rank == 0:
        try:
            result = [open_run(recipe, force)]
        except RecipeError as error:
            result = [error]
    if world.size > 1:
        torch.distributed.broadcast_object_list(result)
    if isinstance(result[0], RecipeError):
        raise result[0]
    return bool(result[0])


def _changes(old: Any, new: Any, name: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = old.keys() | new.keys()
        return [c for key in keys for c in _changes(old.get(key), new.get(key), f"{name}.{key}".strip("."))]
    return [] if old == new else [name]


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in ("bifocal", "torch", "transformers", "datasets", "accelerate", "tokenizers", "peft"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def run_recipe(recipe: Recipe, save: Callable[[Any, BifocalProcessor, Path], Any], force: bool = False) -> Path | None:
    """Train as the recipe says, from the last checkpoint if there is one, and save into its folder's `model`.

    Args:
        save: writes a model and its processor into a folder that load everywhere.

    Returns:
        The model's folder; None if the run was finished before.

    Raises:
        RecipeError: what the recipe asks for is not here, or the folder holds something else.
    """
    require_device(recipe)
    arguments = training_arguments(recipe)  # under torchrun this starts the process group
    if not _open_together(recipe, force):
        return None
    if recipe.mlm is not None:
        from bifocal.training.mlm import train_mlm

        return train_mlm(recipe, arguments)
    prepared = prepare(recipe, [Stopwatch()], arguments=arguments)
    checkpoint = last_complete_checkpoint(recipe.folder)
    trainer = prepared.trainer
    if checkpoint is not None and World.current().is_main:
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
        write_stage(recipe.folder, stage_facts(prepared, seconds_of(trainer), versions()))
        with no_progress_bars():
            save(model, prepared.processor, folder)
    trainer.accelerator.wait_for_everyone()
    return folder
