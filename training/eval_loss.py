"""The losses of evaluation tasks."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from PIL import Image
from transformers.utils import logging

from bifocal.data.kinds import COLUMNS
from bifocal.data.skips import SkipLog, SkippedRow, summary
from bifocal.errors import TrainingError
from bifocal.training.collator import MultiTaskCollator
from bifocal.training.engine.distributed import ProcessGroupInfo
from bifocal.training.engine.joint_forward import joint_forward
from bifocal.training.task_dataset import read_rows
from bifocal.training.tasks import Task

logger = logging.get_logger(__name__)


def task_list(tasks: Any, what: str = "tasks") -> list[Task]:
    """Return the tasks in a task, a sequence of tasks, or a dict, whose keys become their names.

    Args:
        what: how errors call them.

    Raises:
        TrainingError: if something else is among them, or two have one name.
    """
    if isinstance(tasks, Mapping):
        tasks = [replace(task, name=str(name)) if isinstance(task, Task) else task for name, task in tasks.items()]
    members = list(tasks) if isinstance(tasks, Sequence) else [tasks]
    other = next((member for member in members if not isinstance(member, Task)), None)
    if other is not None or isinstance(tasks, str):
        raise TrainingError(
            f"{what} must be Tasks, but there is a {type(other or tasks).__name__}; wrap data like "
            "Task('name', 'text-pair', data, batch_size=64)."
        )
    names = [task.name for task in members]
    if len(set(names)) < len(names):
        raise TrainingError(f"Each of the {what} needs a name of its own, but they are {', '.join(names)}.")
    return members


def require_rows_by_number(tasks: Sequence[Task]) -> None:
    """Check that rows of all tasks can be read by number.

    Raises:
        TrainingError: if a task streams.
    """
    streamed = next((task.name for task in tasks if task.streams), None)
    if streamed is not None:
        raise TrainingError(f"The evaluation task '{streamed}' streams; give it a data set that does not stream.")


def evaluate_tasks(trainer: Any, tasks: Sequence[Task], prefix: str) -> dict[str, float]:
    """Return the mean loss and in-batch accuracy of each task over all its rows.

    The rows are cut, in their order, into as few batches of at most `batch_size` as it takes, all of nearly the same
    size. Each row counts once: a batch weighs as much as it has rows. Batches are shared out to the processes whole, so
    that the result is that of one process. Rows that cannot be used are missing from their batches; their number is
    `{prefix}_{task}_skipped`.

    Nothing is drawn from the global random state, so a run with evaluation ends as one without.

    Args:
        trainer: a `MultiTaskTrainer`.
        prefix: prefix of the metrics' names, such as "eval".

    Raises:
        BadRowsError: if more rows of a task are bad than its `max_bad_fraction` allows.
    """
    model, world, device = trainer.model, trainer.world, trainer.args.device
    # Outside a backward pass DDP has nothing to do; what FSDP has sharded only works through it.
    wrapped = trainer.model_wrapped if world.size == 1 or trainer.is_fsdp_enabled else model
    training = trainer.data_collator
    collate = MultiTaskCollator(
        training.processor, training.max_length, training.seed, pad_to=training.pad_to, prompts=training.prompts
    )
    collate.bucketed = training.bucketed
    metrics: dict[str, float] = {f"{prefix}_loss": 0.0}
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        for task in tasks:
            joint_loss = trainer.joint_loss({task.name: task}, ProcessGroupInfo())
            sums = np.zeros(3)  # of rows, losses and accuracies, the latter two times the rows
            skipped: list[SkippedRow] = []
            batches = np.array_split(np.arange(len(task.dataset)), -(-len(task.dataset) // task.batch_size))
            # Where a forward pass is a collective, all make as many: the last ones again, counted by none.
            for turn in range(-(-len(batches) // world.size)):
                number = turn * world.size + world.rank
                counts = number < len(batches)
                names = batches[min(number, len(batches) - 1)].tolist()
                rows, problems = collate.usable(task, names, read_rows(task.dataset, names))
                good = [(name, row) for name, row in zip(names, rows, strict=True) if row is not None]
                if counts:
                    skipped += problems
                if not good and collate.bucketed:
                    continue
                counts = counts and bool(good)
                good = good or [(0, _stand_in(task))]
                columns = {column: [row[column] for _, row in good] for column in good[0][1]}
                inputs = collate([{"step": names[0], "tasks": [(task, [name for name, _ in good], columns)]}])
                assert inputs is not None
                inputs = inputs.to(device)
                with torch.no_grad(), joint_forward(model):
                    embedded = wrapped(step_texts=inputs["texts"], step_images=inputs["images"])
                    result = joint_loss(embedded, inputs)[1][task.name]
                if counts:
                    sums += len(good) * np.array([1.0, result.loss.item(), result.accuracy.item()])
            total, loss, accuracy = world.mean(sums.tolist(), device)
            bad = _report(task, gather_object(skipped))
            if not total:
                raise TrainingError(f"No row of the evaluation task '{task.name}' can be used; look at its data.")
            metrics[f"{prefix}_{task.name}_loss"] = loss / total
            metrics[f"{prefix}_{task.name}_accuracy"] = accuracy / total
            if bad:
                metrics[f"{prefix}_{task.name}_skipped"] = float(bad)
            metrics[f"{prefix}_loss"] += task.loss_weight * loss / total
    finally:
        for module, training_mode in modes:  # they may differ, as that of a frozen tower does
            module.training = training_mode
    return metrics


def _stand_in(task: Task) -> dict[str, Any]:
    """Return a row that any model can embed, for a process without one where a forward pass is a collective."""
    row: dict[str, Any] = dict.fromkeys(COLUMNS[task.kind], "-")
    if "image" in row:
        row["image"] = Image.new("RGB", (32, 32))
    if "negatives" in row:
        row["negatives"] = ["-"] * (task.num_negatives or 1)
    return row


def _report(task: Task, skipped: Sequence[SkippedRow]) -> int:
    """Log once which rows are skipped, and return their number."""
    if not skipped:
        return 0
    counts = SkipLog()
    counts.add(task.name, len(task.dataset), skipped)
    counts.check(task.name, task.max_bad_fraction, ended=True)
    rows = list(dict.fromkeys(skip.row for skip in skipped))
    shown = ", ".join(rows[:8]) + (", ..." if len(rows) > 8 else "")
    logger.warning_once(
        f"Evaluation task '{task.name}' skips {len(rows):,} of {len(task.dataset):,} rows "
        f"({summary(counts.bad[task.name])}): {'row' if len(rows) == 1 else 'rows'} {shown}."
    )
    return len(rows)
