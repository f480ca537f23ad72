"""The arguments of `MultiTaskTrainer` besides its tasks."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.utils import logging

logger = logging.get_logger(__name__)

_NO_PREDICTIONS = "evaluation computes losses, not predictions; use an EvaluationCallback for other metrics"
# transformers' arguments that have no effect on joint training, and what to do instead. A test holds that every
# argument of the installed release is here, is used, or is known to be harmless.
UNSUPPORTED = {
    "per_device_train_batch_size": "set batch_size of each task",
    "per_device_eval_batch_size": "set batch_size of each evaluation task",
    "auto_find_batch_size": "set auto_find_chunk_size=True, which fits any batch into memory",
    "label_smoothing_factor": "set label_smoothing of each task",
    "group_by_length": "texts are sorted by length within each batch already",
    "train_sampling_strategy": "rows are drawn at random, and texts are sorted by length within each batch already",
    "ignore_data_skip": "rows of finished steps are skipped without being loaded",
    "dataloader_in_order": "batches in another order could not be resumed",
    "include_num_input_tokens_seen": "the log has tokens_per_second",
    "include_for_metrics": _NO_PREDICTIONS,
    "batch_eval_metrics": _NO_PREDICTIONS,
    "bf16_full_eval": "evaluation runs in the dtype of the weights (master_dtype)",
    "fp16_full_eval": "evaluation runs in the dtype of the weights (master_dtype)",
    "optim_target_modules": "optimisers that need it are not supported; set optim to another one",
    "use_liger_kernel": "it has no kernels for dual encoders",
    "liger_kernel_config": "it has no kernels for dual encoders",
    "parallelism_config": "batches are spread over all processes; use DDP or FSDP",
}
# Optimisers that want more of the training loop than a call of step().
_UNSUPPORTED_OPTIMISERS = ("lomo", "adalomo", "galore", "apollo", "schedule_free")


@dataclass
class BifocalTrainingArguments(TrainingArguments):
    """transformers' arguments and those of training two towers together.

    Batch sizes are the tasks' own; arguments of transformers that have no effect here are refused, with the one to use.
    `num_train_epochs` counts epochs as `steps_per_epoch` defines them: as many batches as the rows of the image-text
    tasks fill, or those of the text tasks, whichever are more; twice as many with `alternate_modalities`.

    Args:
        alternate_modalities: each batch holds one modality only, images first, in turn; by default it holds both. The
            rows are those of the joint batches, each of which makes two. Weights that a batch does not reach, such as
            the image tower in a batch of texts, do not move in its step. Tasks of one modality are not affected.
            Refused with DeepSpeed.
        text_chunk_size, image_chunk_size: rows embedded at once through the gradient cache; None embeds all at once.
        auto_find_chunk_size: before training, set both to the largest sizes whose activations fit into memory.
        graph_memory: GiB of activations that each process may keep between the two passes of the gradient cache, so
            that as many chunks as fit are embedded once instead of twice. "auto" is 60 % of what is free at each step;
            0 keeps none. Gradients are the same. FSDP keeps none.
        text_learning_rate, image_learning_rate: learning rate of one tower; `learning_rate` if None.
        layer_lr_decay: factor of the learning rate from each layer to the one below; 1.0 for equal rates.
        freeze_text_layers, freeze_image_layers: number of first layers whose weights, and those of the embeddings below
            them, are not trained.
        freeze_text_tower, freeze_image_tower: train nothing of a tower but its projection (LiT, arXiv 2111.07991).
        ema_decay: keep an exponential moving average of the weights. Evaluation measures the average, the model files
            of checkpoints hold it, and so does the model after training.
        master_dtype: the dtype of the weights that the optimiser moves, "float32" or "bfloat16". In 16 bits small
            updates are lost, so models that are stored in them are trained in float32 by default; `bf16` makes forward
            and backward pass cheaper.
        save_dtype: the dtype of the finished model's file ("float32", "bfloat16" or "float16"), as `bifocal train`
            exports it, `save_model` writes it or `push_to_hub` uploads it; `master_dtype` when None. Checkpoints always
            keep `master_dtype`, also those that the argument `push_to_hub` uploads during training.
        loss_impl: "plain" holds the matrix of similarities, "tiled" never does, "auto" chooses by size.
        exact_image_decoding: decode training images at full size, as in evaluation. By default JPEGs are decoded at
            reduced scale where that is faster; the mean difference is below 1 % of the range.
        loss_reduction: "sum" (the paper) or "mean" of the two directions of a loss.

    Raises:
        ValueError: if a value is out of its range, or `report_to` names something that is not installed.
    """

    alternate_modalities: bool = field(default=False)
    text_chunk_size: int | None = field(default=None)
    image_chunk_size: int | None = field(default=None)
    auto_find_chunk_size: bool = field(default=False)
    graph_memory: float | str = field(default="auto")
    text_learning_rate: float | None = field(default=None)
    image_learning_rate: float | None = field(default=None)
    layer_lr_decay: float = field(default=1.0)
    freeze_text_layers: int = field(default=0)
    freeze_image_layers: int = field(default=0)
    freeze_text_tower: bool = field(default=False)
    freeze_image_tower: bool = field(default=False)
    ema_decay: float | None = field(default=None)
    master_dtype: str = field(default="float32")
    save_dtype: str | None = field(default=None)
    loss_impl: str = field(default="auto")
    loss_reduction: str = field(default="sum")
    exact_image_decoding: bool = field(default=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        # What the Trainer would remove are the columns of the tasks.
        self.remove_unused_columns = False
        for name in ("text_chunk_size", "image_chunk_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, but it is {value}; None embeds a batch at once.")
        self.graph_memory = _gibibytes(self.graph_memory)
        for name in ("freeze_text_layers", "freeze_image_layers"):
            if getattr(self, name) < 0:
                tower = name.replace("_layers", "_tower")
                raise ValueError(f"{name} must be at least 0, but it is {getattr(self, name)}; see also {tower}.")
        if not 0.0 < self.layer_lr_decay <= 1.0:
            raise ValueError(f"layer_lr_decay must be above 0 and at most 1, but it is {self.layer_lr_decay}.")
        if self.ema_decay is not None and not 0.0 < self.ema_decay < 1.0:
            raise ValueError(f"ema_decay must be between 0 and 1, but it is {self.ema_decay}.")
        if self.master_dtype not in ("float32", "bfloat16"):
            raise ValueError(f"master_dtype must be 'float32' or 'bfloat16', but it is '{self.master_dtype}'.")
        if self.save_dtype not in (None, "float32", "bfloat16", "float16"):
            raise ValueError(f"save_dtype must be 'float32', 'bfloat16' or 'float16', but it is '{self.save_dtype}'.")
        if self.ema_decay is not None and self.master_dtype != "float32":
            raise ValueError("An average in bfloat16 would not move; set master_dtype='float32' or no ema_decay.")
        if self.fp16 and self.device.type == "cpu":
            if self.process_index == 0:
                logger.warning("fp16 is off: a CPU cannot train in float16.")
            self.fp16, self.mixed_precision = False, "no"
        missing = _not_installed(self.report_to)
        if missing:
            raise ValueError(f"report_to names '{missing}', which is not installed here; install it or leave it out.")


def _gibibytes(value: Any) -> float | str:
    """Return `graph_memory` as a number, or "auto".

    Raises:
        ValueError: if it is neither.
    """
    if value == "auto":
        return value
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = -1.0
    if isinstance(value, bool) or not 0.0 <= number < float("inf"):
        raise ValueError(f"graph_memory must be 'auto' or a number of GiB of at least 0, but it is {value!r}.")
    return number


def _not_installed(report_to: Any) -> str | None:
    """Return the first of transformers' known integrations for reports that is not installed here."""
    available = get_available_reporting_integrations()
    names = [report_to] if isinstance(report_to, str) else report_to or []
    # "flyte" and the like are in no list; transformers itself says what they need.
    known = ("clearml", "codecarbon", "comet_ml", "dagshub", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio",
             "wandb")  # fmt: skip
    return next((n for n in names if n in known and n in INTEGRATION_TO_CALLBACK and n not in available), None)


def given_arguments(args: Any) -> dict[str, Any]:
    """Return the fields of transformers' arguments that are not at their default, as given to a new object."""
    values = {}
    for item in dataclasses.fields(args):
        if item.init and getattr(args, item.name) != item.default:
            values[item.name] = getattr(args, item.name)
    return values


def unsupported(args: TrainingArguments) -> str | None:
    """Return a message about the first argument that would be silently ignored; None if there is none."""
    for item in dataclasses.fields(args):
        if item.name in UNSUPPORTED:
            factory = item.default_factory
            default = item.default if factory is dataclasses.MISSING else factory()
            value = getattr(args, item.name)
            if value != default:
                return f"{item.name}={value!r} has no effect in joint training: {UNSUPPORTED[item.name]}."
    optimiser = str(getattr(args.optim, "value", args.optim))
    if optimiser.startswith(_UNSUPPORTED_OPTIMISERS) or "layerwise" in optimiser:
        return f"optim='{optimiser}' is not supported in joint training; use another one, such as 'adamw_torch'."
    config = args.accelerator_config
    if getattr(config, "split_batches", False) or getattr(config, "dispatch_batches", None):
        return (
            "split_batches and dispatch_batches have no effect in joint training: each process makes its own batches."
        )
    return None
