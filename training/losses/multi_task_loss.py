"""The loss of a step: the sum over its tasks (arXiv 2405.20204, section 3: L1, L2 and L3)."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from bifocal.errors import TrainingError
from bifocal.training.collator import JointBatch
from bifocal.training.engine.distributed import ProcessGroupInfo
from bifocal.training.losses.info_nce import info_nce, info_nce_plus
from bifocal.training.losses.matryoshka import matryoshka
from bifocal.training.losses.sigmoid import sigmoid_loss
from bifocal.training.losses.tiled_similarity import FalseNegativeMask
from bifocal.training.tasks import TEXT_TEMPERATURE, Task

ACCURACY_ROWS = 1024  # rows of a batch that the in-batch accuracy is computed on


@dataclass
class TaskResult:
    """Loss and accuracy of a task in one step.

    Args:
        loss: scalar, before the task's weight.
        accuracy: share of the rows whose positive is the most similar of this process's candidates, hard negatives
            included, excluded pairs not.
    """

    loss: torch.Tensor
    accuracy: torch.Tensor


def with_default_loss(task: Task, has_bias: bool) -> Task:
    """Return a task with a loss: its own, or that of the model.

    Args:
        has_bias: whether the model learns the bias of SigLIP's loss.

    Raises:
        TrainingError: if the sigmoid loss needs a bias that the model does not have, or its task has label smoothing.
    """
    loss = task.loss or ("sigmoid" if has_bias and task.kind == "image-text" else "info_nce")
    if loss == "sigmoid" and not has_bias:
        raise TrainingError(
            f"The sigmoid loss of task '{task.name}' needs a learned bias, but the model has none; set "
            "logit_bias_init_value=-10.0 in its config."
        )
    if loss == "sigmoid" and task.label_smoothing:
        raise TrainingError(
            f"Task '{task.name}' has label_smoothing, which the sigmoid loss does not; set its loss to 'info_nce'."
        )
    task = copy.copy(task)
    object.__setattr__(task, "loss", loss)  # dataclasses.replace would read the data set again
    return task


class MultiTaskLoss:
    """The joint loss of a step, such as L1 = L_nce(text pairs) + L_nce(short captions).

    Args:
        tasks: by name.
        world: candidates come from all its processes.
        impl: form of the losses, "auto", "plain" or "tiled".
        reduction: "sum" (the paper) or "mean" of the two directions.
    """

    def __init__(
        self,
        tasks: dict[str, Task],
        world: ProcessGroupInfo = ProcessGroupInfo(),
        impl: str = "auto",
        reduction: str = "sum",
    ) -> None:
        self.tasks, self.world, self.impl, self.reduction = tasks, world, impl, reduction

    def __call__(
        self, embeddings: dict[str, torch.Tensor], batch: JointBatch
    ) -> tuple[torch.Tensor, dict[str, TaskResult]]:
        """Return the sum of loss_weight * loss over the tasks of a batch, and the result of each task.

        Args:
            embeddings: embeddings of all texts (in the sorted order of the batch) and images, with `scale` and `bias`.
        """
        texts = embeddings["texts"][batch["order"]] if "texts" in embeddings else None
        images = embeddings.get("images")
        total = torch.zeros((), device=batch["order"].device)
        results = {}
        for name, task_batch in batch["tasks"].items():
            columns = {
                column: (images if column == "image" else texts)[first:last]  # type: ignore[index]
                for column, (first, last) in task_batch.spans.items()
            }
            results[name] = self._task_result(self.tasks[name], columns, task_batch.ids, embeddings)
            total = total + self.tasks[name].loss_weight * results[name].loss
        return total, results

    def _task_result(
        self,
        task: Task,
        columns: dict[str, torch.Tensor],
        ids: dict[str, torch.Tensor],
        embeddings: dict[str, torch.Tensor],
    ) -> TaskResult:
        first, second = ("caption", "image") if task.kind == "image-text" else ("query", "positive")
        a, b, a_ids, b_ids = columns[first], columns[second], ids[first], ids[second]
        negatives, negative_ids = None, ids.get("negatives")
        if "negatives" in columns:
            negatives = columns["negatives"].unflatten(0, (len(a), -1))
        temperature = self._temperature(task, embeddings)
        options: dict[str, Any] = dict(impl=self.impl, world=self.world)
        if task.loss == "sigmoid":
            options["bias"] = embeddings.get("bias", -10.0)
        else:
            options |= dict(reduction=self.reduction, label_smoothing=task.label_smoothing)
        loss_function: Callable[..., torch.Tensor] = sigmoid_loss if task.loss == "sigmoid" else info_nce
        if negatives is not None:
            loss_function = info_nce_plus
        if task.matryoshka_dims:
            loss_function = matryoshka(loss_function, task.matryoshka_dims)
        if negatives is not None:
            loss = loss_function(a, b, negatives, temperature, a_ids, b_ids, negative_ids, **options)
        else:
            loss = loss_function(a, b, temperature, a_ids, b_ids, **options)
        return TaskResult(loss, in_batch_accuracy(a, b, a_ids, b_ids, negatives, negative_ids))

    @staticmethod
    def _temperature(task: Task, embeddings: dict[str, torch.Tensor]) -> float | torch.Tensor:
        if task.temperature is not None:
            return task.temperature
        if task.kind != "image-text":
            return TEXT_TEMPERATURE
        if "scale" not in embeddings:
            raise TrainingError(f"Task '{task.name}' needs a temperature, since the model has no logit_scale.")
        return 1.0 / embeddings["scale"]


@torch.no_grad()
def in_batch_accuracy(
    a: torch.Tensor,
    b: torch.Tensor,
    a_ids: torch.Tensor,
    b_ids: torch.Tensor,
    negatives: torch.Tensor | None = None,
    negative_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the share of the first `ACCURACY_ROWS` rows whose positive is more similar than every other candidate."""
    a, b, a_ids, b_ids = (values[:ACCURACY_ROWS] for values in (a, b, a_ids, b_ids))
    rows = slice(0, len(a))
    excluded = FalseNegativeMask(((a_ids, a_ids), (b_ids, b_ids), (a_ids, b_ids)), 0).matrix(rows, rows)
    assert excluded is not None
    scores = (a @ b.t()).masked_fill(excluded, -2.0)
    positive = scores.diagonal()
    best = scores.masked_fill(torch.eye(len(a), dtype=torch.bool, device=a.device), -2.0).amax(1)
    if negatives is not None and negative_ids is not None:
        hard_ids = negative_ids[:ACCURACY_ROWS]
        excluded = (hard_ids == b_ids[:, None]) | (hard_ids == a_ids[:, None])
        to_negatives = torch.einsum("nd,nkd->nk", a, negatives[:ACCURACY_ROWS]).masked_fill(excluded, -2.0)
        best = torch.maximum(best, to_negatives.amax(1))
    return (positive > best).float().mean()
