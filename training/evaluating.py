"""The losses of tasks that are not trained on."""

from collections.abc import Sequence
from typing import Any

import torch

from bifocal.training.collator import MultiTaskCollator
from bifocal.training.tasks import Task


def evaluate_tasks(trainer: Any, tasks: Sequence[Task], prefix: str) -> dict[str, float]:
    """Mean loss and in-batch accuracy of each task over its whole batches, in the order of its rows.

    Nothing is drawn from the global random state, so a run with evaluation ends as one without.

    Args:
        trainer: a `MultiTaskTrainer`.
        prefix: of the names, such as "eval".
    """
    model, world, device = trainer.model, trainer.world, trainer.args.device
    # Outside a backward pass DDP has nothing to do; what FSDP has sharded only works through it.
    wrapped = trainer.model_wrapped if world.size == 1 or trainer.is_fsdp_enabled else model
    collate = MultiTaskCollator(
        trainer.data_collator.processor, trainer.max_length, trainer.args.seed, None, world.rank
    )
    metrics: dict[str, float] = {f"{prefix}_loss": 0.0}
    was_training = model.training
    model.eval()
    with torch.no_grad():
        for task in tasks:
            values = []
            joint = task.batch_size * world.size
            for start in range(0, len(task.dataset) - joint + 1, joint):
                first = start + world.rank * task.batch_size
                rows = list(range(first, first + task.batch_size))
                inputs = collate([{"step": start, "tasks": [(task, rows, task.dataset[rows])]}])
                _, outputs = trainer.compute_loss(wrapped, inputs, return_outputs=True)
                result = outputs["results"][task.name]
                values.append([result.loss.item(), result.accuracy.item()])
            loss, accuracy = world.mean(torch.tensor(values, dtype=torch.float64).mean(0).tolist(), device)
            metrics[f"{prefix}_{task.name}_loss"] = loss
            metrics[f"{prefix}_{task.name}_accuracy"] = accuracy
            metrics[f"{prefix}_loss"] += task.loss_weight * loss
    model.train(was_training)
    return metrics
