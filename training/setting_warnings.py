"""Warnings about settings whose effect a user may not expect."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers.utils import logging

from bifocal.training.arguments import BifocalTrainingArguments
from bifocal.training.engine.joint_forward import temperature_of
from bifocal.training.tasks import Task
from bifocal.training.towers import towers_of

logger = logging.get_logger(__name__)


def warn_of_settings(
    args: BifocalTrainingArguments, model: Any, tasks: Sequence[Task], loaded_dtypes: set[torch.dtype]
) -> None:
    """Warn about weights of another dtype, parts that are not trained as set, batches and accumulated gradients.

    Args:
        args: arguments of the trainer.
        model: model that is trained.
        tasks: tasks that it is trained on.
        loaded_dtypes: dtypes of the weights, before training, that are trained in another dtype.
    """
    if loaded_dtypes:
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in loaded_dtypes))
        logger.warning(
            f"The model came in {names}; its weights are trained in {args.master_dtype} (master_dtype) and saved "
            f"in {args.save_dtype or args.master_dtype} (save_dtype)."
        )
    scale = getattr(model, "logit_scale", None)
    learned = [task.name for task in tasks if task.modality == "image" and task.temperature is None]
    if learned and scale is not None and not scale.requires_grad:
        tau = 1.0 / temperature_of(model)["scale"].item()
        logger.warning(
            f"The temperature of task '{learned[0]}' stays at {tau:.4f}, since logit_scale is not trained (LoRA "
            "adapters do not cover it). Set temperature of the task to change it."
        )
    if getattr(args, "activation_checkpointing", None) or args.gradient_checkpointing:
        for tower in towers_of(model):
            if not any(hasattr(module, "gradient_checkpointing") for module in tower.module.modules()):
                logger.warning(
                    f"activation_checkpointing has no effect on the {tower.name} tower: a "
                    f"{type(tower.module).__name__} does not support it."
                )
    modalities = {task.modality for task in tasks}
    if args.alternate_modalities and len(modalities) == 1:
        logger.warning(f"alternate_modalities has no effect: all tasks are of one modality ({modalities.pop()}).")
    elif args.alternate_modalities and args.gradient_accumulation_steps % 2 == 0:
        logger.warning(
            f"With gradient_accumulation_steps={args.gradient_accumulation_steps}, each step adds up both modalities, "
            "as without alternate_modalities. Set it to 1 for steps of one modality."
        )
    if args.gradient_accumulation_steps > 1:
        logger.warning(
            f"gradient_accumulation_steps={args.gradient_accumulation_steps} adds up losses whose negatives come "
            "from their own batch only; for more negatives raise batch_size of the tasks and set text_chunk_size "
            "and image_chunk_size."
        )
