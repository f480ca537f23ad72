"""`MultiTaskTrainer`: transformers' Trainer with one batch of every task in each step and their losses added up."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments

from bifocal.modeling import BifocalModel, BifocalProcessor
from bifocal.training.batches import StepBatches
from bifocal.training.collator import Augmentation, MultiTaskCollator
from bifocal.training.losses import info_nce, info_nce_plus
from bifocal.training.tasks import Task

# As EVA: neither learned positions nor the class token decay; nor does what is no matrix (norms, biases, logit_scale).
_NO_DECAY = ("class_token", "position_embedding", "word_embeddings", "token_type_embeddings")


class _ClampLogitScale(TrainerCallback):
    """Keeps ln(1/tau) between 0 and its maximum, as CLIP does: beyond it the clamp in `forward` passes no gradient."""

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        with torch.no_grad():
            model.logit_scale.clamp_(0.0, model.config.logit_scale_max)


class MultiTaskTrainer(Trainer):
    """Trains both towers together on several tasks (arXiv 2405.20204, section 3).

    The loss of a step is the sum over the tasks of weight times InfoNCE (with hard negatives InfoNCE+). The number of
    steps is `args.max_steps`; batch sizes are the tasks' own. The order of the batches is a function of `args.seed` and
    the step, so `train(resume_from_checkpoint=...)` goes on with the rows that follow.

    Args:
        model: the model to train.
        args: of transformers; `per_device_train_batch_size` is not used.
        tasks: what to train on.
        processor: saved with every checkpoint; `model.processor` when None.
        max_length: tokens kept of a text, special tokens included: 77 in stage 1, 512 later (the paper); as many as
            the text tower takes when None.
        augment: applied to training pictures.
        callbacks: as for the Trainer.

    Raises:
        ValueError: `args.max_steps` not given, no tasks, two of one name, or more than one process.
    """

    def __init__(
        self,
        model: BifocalModel,
        args: TrainingArguments,
        tasks: Sequence[Task],
        processor: BifocalProcessor | None = None,
        max_length: int | None = None,
        augment: Augmentation | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        names = [task.name for task in tasks]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"A stage needs at least one task and a name of its own for each, but it has {names}.")
        if args.max_steps <= 0:
            raise ValueError("MultiTaskTrainer counts steps, not epochs; set max_steps in the training arguments.")
        if args.world_size > 1:
            raise ValueError("MultiTaskTrainer runs in one process; start it without torchrun or accelerate launch.")
        processor = processor or model.processor
        max_length = max_length or model.config.text_config.max_position_embeddings
        self.tasks = {task.name: task for task in tasks}
        self.dual_encoder = model
        self.step_batches = StepBatches(tasks, args.max_steps, args.seed)
        super().__init__(
            model=model,
            args=args,
            data_collator=MultiTaskCollator(processor, max_length, args.seed, augment),
            train_dataset=self.step_batches,
            processing_class=processor,
            callbacks=[*(callbacks or []), _ClampLogitScale()],
        )
        self.model_accepts_loss_kwargs = False  # the losses are means over the batch, not sums over its tokens
        self._task_losses: dict[str, list[float]] = {name: [] for name in names}

    def get_train_dataloader(self) -> DataLoader:
        """One item is one step. A sampler of its own per item lets the Trainer skip done steps without loading them."""
        loader = DataLoader(
            self.step_batches,
            batch_size=1,
            shuffle=False,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            persistent_workers=self.args.dataloader_persistent_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor,
        )
        return self.accelerator.prepare(loader)

    def get_decay_parameter_names(self, model: torch.nn.Module) -> list[str]:
        return [
            name
            for name, parameter in model.named_parameters()
            if parameter.ndim >= 2 and not any(part in name for part in _NO_DECAY)
        ]

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The weighted sum of the tasks' losses.

        Raises:
            FloatingPointError: a loss that is not finite, with the step and the task.
        """
        total, outputs = torch.zeros((), device=self.args.device), {}
        for name, batch in inputs.items():
            task = self.tasks[name]
            temperature = 1.0 / model.get_logit_scale() if task.temperature is None else task.temperature
            outputs[name] = {column: self._embed(model, tensors) for column, tensors in batch["features"].items()}
            loss = _task_loss(task, outputs[name], batch["ids"], temperature)
            value = loss.item()
            if value != value or value in (float("inf"), float("-inf")):
                raise FloatingPointError(
                    f"The loss of task '{name}' is {value} at step {self.state.global_step + 1}; lower the learning "
                    "rate and resume from the last checkpoint."
                )
            self._task_losses[name].append(value)
            total = total + task.weight * loss
        return (total, outputs) if return_outputs else total

    @staticmethod
    def _embed(model: Any, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        encode = model.get_image_features if "pixel_values" in tensors else model.get_text_features
        return F.normalize(encode(**tensors).pooler_output, dim=-1)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds each task's mean loss since the last log and the learned temperature."""
        if "loss" in logs:
            for name, values in self._task_losses.items():
                if values:
                    logs[f"loss/{name}"] = sum(values) / len(values)
                    values.clear()
            logs["temperature"] = 1.0 / self.dual_encoder.get_logit_scale().item()
        super().log(logs, *args, **kwargs)


def _task_loss(
    task: Task,
    embedded: dict[str, torch.Tensor],
    ids: dict[str, torch.Tensor],
    temperature: float | torch.Tensor,
) -> torch.Tensor:
    if task.kind == "image-text":
        return info_nce(embedded["caption"], embedded["image"], temperature, ids["caption"], ids["image"])
    query, positive = embedded["query"], embedded["positive"]
    if task.kind == "text-pair":
        return info_nce(query, positive, temperature, ids["query"], ids["positive"])
    negatives = embedded["negatives"].unflatten(0, (len(query), -1))
    return info_nce_plus(query, positive, negatives, temperature, ids["query"], ids["positive"], ids["negatives"])
