"""Build what a recipe names: its training arguments, processor, model and LoRA adapters."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer
from transformers.utils import logging

from bifocal.data.kinds import COLUMNS
from bifocal.data.schema import ended
from bifocal.data.skips import start_log
from bifocal.errors import RecipeError, first_line
from bifocal.files import RUN, replace_folder
from bifocal.modeling import BifocalConfig, BifocalModel, BifocalProcessor
from bifocal.modeling.encoding_bifocal import folder_or_id
from bifocal.modeling.loading_bifocal import is_dual_encoder, read_config
from bifocal.modeling.processing_bifocal import image_processor_of_size
from bifocal.progress import no_progress_bars
from bifocal.training.arguments import BifocalTrainingArguments
from bifocal.training.checkpoints import LOADING_LOG
from bifocal.training.engine.distributed import ProcessGroupInfo
from bifocal.training.precision import DTYPES, mixed_precision
from bifocal.training.recipe import Recipe, StartFrom
from bifocal.training.run_folder import stage_folder
from bifocal.training.tasks import Task
from bifocal.training.tokenizer import TOKENIZERS
from bifocal.training.towers import linear_layers, tower_of

logger = logging.get_logger(__name__)


def training_arguments(recipe: Recipe, begun: str | None = None, **changes: Any) -> BifocalTrainingArguments:
    """Return the training arguments of a recipe, in bfloat16 where the device multiplies in it, unless `bf16` is set.

    Args:
        begun: mixed precision of the run that is resumed, as from `begun_precision`; None for a new run.
        changes: arguments that override the recipe's.

    Raises:
        RecipeError: if an argument has no valid value.
    """
    settings = {"report_to": "none", "save_total_limit": 2, "logging_steps": 10, **recipe.training, **changes}
    settings |= {"output_dir": str(recipe.folder), "seed": recipe.seed, "restore_callback_states_from_checkpoint": True}
    if recipe.mlm is not None:
        settings["per_device_train_batch_size"] = recipe.mlm.batch_size
    device = torch.device("cpu") if recipe.device == "cpu" else torch.accelerator.current_accelerator(True)
    if device is None or device.type == "cpu":
        device, settings["use_cpu"] = torch.device("cpu"), True
    precision, remark = mixed_precision(settings, device, begun)
    if not (settings.get("bf16") is True and settings.get("fp16")):  # which transformers refuses
        settings |= {"bf16": precision == "bf16", "fp16": precision == "fp16"}
    try:
        arguments = BifocalTrainingArguments(**settings)
    except (ValueError, TypeError) as error:
        raise RecipeError(f"Recipe '{recipe.name}', training: {error}") from error
    arguments.mixed_precision = precision  # also where accelerate launch says otherwise
    if remark and arguments.process_index == 0:
        logger.warning(remark)
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


def load_processor(recipe: Recipe, tasks: Sequence[Task], start: BifocalModel | None = None) -> BifocalProcessor:
    """Return the recipe's processor, that of the model it starts from, or one with a newly trained tokenizer.

    It is kept in the run's folder, so that a resumed run has the same.

    Args:
        tasks: their texts train the tokenizer.
        start: model that the recipe starts from.

    Raises:
        RecipeError: if the recipe names no processor, or it cannot be loaded.
    """
    kept = recipe.folder / "processor"
    if kept.exists():
        processor = BifocalProcessor.from_pretrained(kept)
    elif recipe.tokenizer_vocab_size is not None:
        processor = _new_processor(recipe, tasks)
    elif recipe.processor is not None:
        processor = _saved_processor(recipe, recipe.processor, start)
    elif start is not None:
        processor = _processor_of(recipe, start)
    elif isinstance(recipe.start_from, str):  # of masked language modeling
        processor = _saved_processor(recipe, recipe.start_from)
    else:
        raise RecipeError(
            f"Recipe '{recipe.name}' has none of processor, start_from and tokenizer_vocab_size. Set one."
        )
    if recipe.image_size is not None:
        _set_image_size(processor.image_processor, recipe.image_size)
    if not kept.exists() and ProcessGroupInfo.current().rank == 0 and recipe.folder.exists():
        with replace_folder(kept, RUN) as folder:
            processor.save_pretrained(folder)
    return processor


def _processor_of(recipe: Recipe, model: BifocalModel) -> BifocalProcessor:
    try:
        return model.processor
    except ValueError as error:
        raise RecipeError(
            f"Recipe '{recipe.name}': what it starts from has no processor ({first_line(error)}). Set processor."
        ) from error


def _set_image_size(image_processor: Any, size: int) -> None:
    """Let an image processor of any family return square images of a size."""
    fixed = {"height": size, "width": size}
    image_processor.size = {"shortest_edge": size} if "shortest_edge" in dict(image_processor.size) else fixed
    if getattr(image_processor, "crop_size", None) is not None:
        image_processor.crop_size = fixed


def _saved_processor(recipe: Recipe, source: str, start: BifocalModel | None = None) -> BifocalProcessor:
    """Load a Bifocal processor, or any tokenizer and add the image processor of the model that a recipe starts from."""
    try:
        if not Path(source).exists() or (Path(source) / "processor_config.json").exists():
            try:
                return BifocalProcessor.from_pretrained(source)
            except (OSError, ValueError, TypeError):
                if Path(source).exists():
                    raise
        tokenizer = AutoTokenizer.from_pretrained(source)
        if start is not None:
            return BifocalProcessor(_processor_of(recipe, start).image_processor, tokenizer)
        return _with_image_processor(recipe, tokenizer)
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


def load_start(recipe: Recipe) -> BifocalModel | None:
    """Return the model that a recipe starts from; None if it starts from nothing.

    That is the finished model of a stage, any dual encoder, or two towers with new heads into the shared space.

    Raises:
        RecipeError: if the earlier stage is not trained yet, its weights cannot be loaded, or a key of `model` is not
            valid.
    """
    start = recipe.start_from
    if start is None:
        return None
    dtype = DTYPES.get(recipe.training.get("master_dtype", "float32"))
    try:
        if isinstance(start, StartFrom) and start.stage is None:
            _require_no_tower(recipe)
            with no_progress_bars():
                return BifocalModel.from_towers(text=start.text, image=start.image, dtype=dtype, **recipe.model)
        path = start if isinstance(start, str) else stage_folder(recipe, start)
        # Unknown keys are allowed in a saved config, but not in a recipe.
        known = BifocalConfig()
        BifocalConfig(**{key: value for key, value in recipe.model.items() if not hasattr(known, key)})
        config = read_config(folder_or_id(path))
        if config is not None and not isinstance(config, BifocalConfig) and not is_dual_encoder(config):
            raise ValueError(
                f"'{path}' is not a dual encoder; name two towers, as in start_from: {{text: {path}, image: ...}}."
            )
        if is_dual_encoder(config):
            _require_no_tower(recipe)
        settings: dict[str, Any] = dict(recipe.model)
        if isinstance(config, BifocalConfig):
            changed = BifocalConfig.from_pretrained(folder_or_id(path), **recipe.model)
            settings = {"config": BifocalConfig(**changed.to_dict())}
        with no_progress_bars():
            return BifocalModel.from_pretrained(path, dtype=dtype, **settings)
    except (OSError, TypeError, ValueError) as error:
        if isinstance(error, RecipeError):
            raise
        key = "start_from" if isinstance(error, OSError) else "model"
        raise RecipeError(f"Recipe '{recipe.name}', {key}: {ended(first_line(error))}") from error


def _require_no_tower(recipe: Recipe) -> None:
    tower = next((key for key in ("text_config", "vision_config") if key in recipe.model), None)
    if tower is not None:
        raise ValueError(f"{tower} is that of the tower in start_from; remove it.")


def vocabulary(tokenizer: Any) -> dict[str, int]:
    """Return the keys of a new text tower's configuration that depend on its tokenizer."""
    special = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    known = {name: number for name, number in special.items() if number is not None}
    return {"vocab_size": -(-len(tokenizer) // 64) * 64, **known}


def new_model(recipe: Recipe, processor: BifocalProcessor) -> BifocalModel:
    """Return a new model of the recipe's size.

    Args:
        processor: its tokenizer decides the vocabulary size.

    Raises:
        RecipeError: if a key or size is invalid.
    """
    settings = {key: value for key, value in recipe.model.items() if key != "text_config"}
    try:
        text = {**vocabulary(processor.tokenizer), **recipe.model.get("text_config", {})}
        return BifocalModel(BifocalConfig(text_config=text, **settings))
    except (OSError, TypeError, ValueError) as error:
        raise RecipeError(f"Recipe '{recipe.name}', model: {error}") from error


def add_lora(recipe: Recipe, model: BifocalModel) -> Any:
    """Return the model with the recipe's LoRA adapters.

    Raises:
        RecipeError: if peft is not installed, or no linear layer has one of the names in `target_modules`.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise RecipeError(f"Recipe '{recipe.name}' uses lora, which needs peft. Run `pip install peft`.") from error
    assert recipe.lora is not None
    processor = model.processor
    settings = recipe.lora
    targets = linear_layers(model) if settings.target_modules is None else settings.target_modules
    config = LoraConfig(
        r=settings.r, lora_alpha=settings.lora_alpha, lora_dropout=settings.lora_dropout, target_modules=list(targets)
    )
    try:
        adapted = get_peft_model(model, config)
    except ValueError as error:
        raise RecipeError(
            f"Recipe '{recipe.name}', lora: {first_line(error)} Remove target_modules for all linear layers."
        ) from error
    reached = {tower_of(name) for name in adapted.targeted_module_names}
    for tower in ("text", "image"):
        if tower not in reached:
            logger.warning(
                f"Recipe '{recipe.name}', lora: target_modules names no layer of the {tower} tower, so it is not "
                "trained."
            )
    model.processor = processor
    return adapted
