"""Build what a recipe names: its training arguments, processor, model and LoRA adapters."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer
from transformers.utils import logging

from bifocal.data.kinds import COLUMNS
from bifocal.data.skips import start_log
from bifocal.errors import RecipeError, first_line
from bifocal.files import RUN, replace_folder
from bifocal.modeling import BifocalConfig, BifocalModel, BifocalProcessor, BifocalTextModel, BifocalVisionModel
from bifocal.modeling.processing_bifocal import image_processor_of_size
from bifocal.progress import no_progress_bars
from bifocal.training.arguments import BifocalTrainingArguments
from bifocal.training.checkpoints import LOADING_LOG
from bifocal.training.engine.distributed import ProcessGroupInfo
from bifocal.training.precision import DTYPES
from bifocal.training.recipe import InitFrom, Recipe
from bifocal.training.tasks import Task
from bifocal.training.tokenizer import TOKENIZERS

logger = logging.get_logger(__name__)


def training_arguments(recipe: Recipe, **changes: Any) -> BifocalTrainingArguments:
    """Return the training arguments of a recipe; float32 on a CPU.

    Args:
        changes: arguments that override the recipe's.

    Raises:
        RecipeError: if an argument has no valid value.
    """
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
    """Check that the device of a recipe is available.

    Raises:
        RecipeError: if the recipe needs a GPU and the machine has none.
    """
    if recipe.device == "cuda" and not torch.cuda.is_available():
        raise RecipeError(f"Recipe '{recipe.name}' needs CUDA, but this machine has none. Set device=cpu or auto.")


def loading_log(recipe: Recipe) -> Path | None:
    """Start the log of rows that are skipped while loading and return its path; None in processes that write none."""
    if not recipe.folder.exists() or ProcessGroupInfo.current().rank:
        return None
    return start_log(recipe.folder / LOADING_LOG)


def load_processor(recipe: Recipe, tasks: Sequence[Task]) -> BifocalProcessor:
    """Return the recipe's processor, that of the model it starts from, or one with a newly trained tokenizer.

    It is kept in the run's folder, so that a resumed run has the same.

    Args:
        tasks: their texts train the tokenizer.

    Raises:
        RecipeError: if the recipe names no processor, or it cannot be loaded.
    """
    kept = recipe.folder / "processor"
    source = recipe.processor or (None if recipe.init_from is None else _init_path(recipe, "text"))
    if kept.exists():
        processor = BifocalProcessor.from_pretrained(kept)
    elif recipe.tokenizer_vocab_size is not None:
        processor = _new_processor(recipe, tasks)
    elif source is not None:
        processor = _saved_processor(recipe, source)
    else:
        raise RecipeError(f"Recipe '{recipe.name}' has none of processor, init_from and tokenizer_vocab_size. Set one.")
    if recipe.image_size is not None:
        sized = image_processor_of_size(recipe.image_size)
        processor.image_processor.size, processor.image_processor.crop_size = sized.size, sized.crop_size
    if not kept.exists() and ProcessGroupInfo.current().rank == 0 and recipe.folder.exists():
        with replace_folder(kept, RUN) as folder:
            processor.save_pretrained(folder)
    return processor


def _saved_processor(recipe: Recipe, source: str) -> BifocalProcessor:
    """Load a Bifocal processor, or any tokenizer and add the image processor of the towers."""
    try:
        if not Path(source).exists() or (Path(source) / "processor_config.json").exists():
            try:
                return BifocalProcessor.from_pretrained(source)
            except (OSError, ValueError, TypeError):
                if Path(source).exists():
                    raise
        return _with_image_processor(recipe, AutoTokenizer.from_pretrained(source))
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"Recipe '{recipe.name}': there is no processor at '{source}' ({first_line(error)})."
        ) from error


def _with_image_processor(recipe: Recipe, tokenizer: Any) -> BifocalProcessor:
    return BifocalProcessor(image_processor_of_size(recipe.image_size or 224), tokenizer)


def _new_processor(recipe: Recipe, tasks: Sequence[Task]) -> BifocalProcessor:
    texts: list[str] = []
    for task in tasks:
        for column in COLUMNS[task.kind]:
            if column != "image":
                for value in task.dataset.select_columns([column])[column]:
                    texts += value if isinstance(value, list) else [value]
    assert recipe.tokenizer_vocab_size is not None
    # Each text once: a tokenizer is a function of the texts, whatever tasks they come from.
    train = TOKENIZERS[recipe.tokenizer_type]
    tokenizer = train(sorted(set(texts)), recipe.tokenizer_vocab_size, recipe.max_length)
    return _with_image_processor(recipe, tokenizer)


def _init_path(recipe: Recipe, tower: str) -> str:
    """Return the folder or Hub id of the weights that a recipe starts from.

    Args:
        tower: "text" or "vision".

    Raises:
        RecipeError: if the stage before has not been trained, or a tower is missing.
    """
    start = recipe.init_from
    if isinstance(start, str):
        return start
    assert start is not None
    if start.stage is not None:
        folder = Path("runs") / start.stage / "model"
        if not (folder / "config.json").exists():
            raise RecipeError(
                f"Recipe '{recipe.name}' starts from stage '{start.stage}', but {folder} does not exist. "
                f"Run `bifocal train {start.stage}` first."
            )
        return str(folder)
    path = getattr(start, tower)
    if path is None:
        raise RecipeError(f"Recipe '{recipe.name}', init_from: set stage, or both text and vision.")
    return path


def vocabulary(tokenizer: Any) -> dict[str, int]:
    """Return the keys of a new text tower's configuration that depend on its tokenizer."""
    special = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    known = {name: number for name, number in special.items() if number is not None}
    return {"vocab_size": -(-len(tokenizer) // 64) * 64, **known}


def load_model(recipe: Recipe, processor: BifocalProcessor) -> BifocalModel:
    """Return a new model of the recipe's size, or the model it starts from.

    Args:
        processor: its tokenizer decides the vocabulary size of a new model.

    Raises:
        RecipeError: if a key or size is invalid, or the weights cannot be loaded.
    """
    start = recipe.init_from
    dtype = DTYPES.get(recipe.training.get("master_dtype", "float32"))
    try:
        if start is None:
            settings = {key: value for key, value in recipe.model.items() if key != "text_config"}
            text = {**vocabulary(processor.tokenizer), **recipe.model.get("text_config", {})}
            return BifocalModel(BifocalConfig(text_config=text, **settings))
        if isinstance(start, InitFrom) and start.stage is None:
            with no_progress_bars():
                text_tower: Any = BifocalTextModel.from_pretrained(_init_path(recipe, "text"), dtype=dtype)
                image_tower: Any = BifocalVisionModel.from_pretrained(_init_path(recipe, "vision"), dtype=dtype)
            config = BifocalConfig(text_config=text_tower.config, vision_config=image_tower.config, **recipe.model)
            model = BifocalModel(config)
            model.text_model.load_state_dict(text_tower.state_dict())
            model.vision_model.load_state_dict(image_tower.state_dict())
            return model
        path = _init_path(recipe, "text")
        saved = BifocalConfig.from_pretrained(path)
        # Unknown keys are allowed in a saved config, but not in a recipe.
        BifocalConfig(**{key: value for key, value in recipe.model.items() if not hasattr(saved, key)})
        changed = BifocalConfig.from_pretrained(path, **recipe.model)
        with no_progress_bars():
            return BifocalModel.from_pretrained(path, config=BifocalConfig(**changed.to_dict()), dtype=dtype)
    except (OSError, TypeError, ValueError) as error:
        if isinstance(error, RecipeError):
            raise
        raise RecipeError(f"Recipe '{recipe.name}', model: {error}") from error


def add_lora(recipe: Recipe, model: BifocalModel) -> Any:
    """Return the model with the recipe's LoRA adapters.

    Raises:
        RecipeError: if peft is not installed.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise RecipeError(f"Recipe '{recipe.name}' uses lora, which needs peft. Run `pip install peft`.") from error
    assert recipe.lora is not None
    processor = model.processor
    settings = recipe.lora
    config = LoraConfig(
        r=settings.r, lora_alpha=settings.lora_alpha, lora_dropout=settings.lora_dropout,
        target_modules=list(settings.target_modules),
    )  # fmt: skip
    adapted = get_peft_model(model, config)
    model.processor = processor
    return adapted
