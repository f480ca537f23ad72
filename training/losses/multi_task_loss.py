"""The loss of a step: the sum over its tasks (arXiv 2405.20204, section 3: L1, L2 and L3)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from bifocal.errors import TrainingError
from bifocal.training.collator import Columns, StepInputs
from bifocal.training.engine.distributed import World
from bifocal.training.losses.info_nce import info_nce, info_nce_plus, matryoshka, sigmoid_loss
from bifocal.training.losses.tiled_similarity import Exclusions
from bifocal.training.tasks import TEXT_TEMPERATURE, Task

_RATED = 1024  # rows of a batch that the in-batch accuracy looks at


@dataclass
class TaskResult:
    """
    Args:
        loss: scalar, before the task's weight.
        accuracy: share of the rows whose partner is the most similar of this process's candidates, hard negatives
            among them, excluded pairs not.
    """

    loss: torch.Tensor
    accuracy: torch.Tensor


class Objective:
    """Sum over the tasks of loss_weight * loss.

    Args:
        tasks: by name.
        world: candidates come from all its processes.
        form: of the losses, "auto", "plain" or "tiled".
        reduction: "sum" (the paper) or "mean" of the two directions.
    """

    def __init__(
        self, tasks: dict[str, Task], world: World = World(), form: str = "auto", reduction: str = "sum"
    ) -> None:
        self.tasks, self.world, self.form, self.reduction = tasks, world, form, reduction

    def __call__(
        self, embedded: dict[str, torch.Tensor], inputs: StepInputs
    ) -> tuple[torch.Tensor, dict[str, TaskResult]]:
        """
        Args:
            embedded: of all texts (in the sorted order of the inputs) and images, with `scale` and `bias`.
        """
        if "texts" in embedded:
            embedded = {**embedded, "texts": embedded["texts"][inputs["order"]]}
        total = torch.zeros((), device=inputs["order"].device)
        results = {}
        for name, columns in inputs["tasks"].items():
            task = self.tasks[name]
            sides = {
                column: embedded["images" if column == "image" else "texts"][first:last]
                for column, (first, last) in columns.spans.items()
            }
            results[name] = self._task(task, sides, columns, embedded)
            total = total + task.loss_weight * results[name].loss
        return total, results

    def _task(
        self, task: Task, sides: dict[str, torch.Tensor], columns: Columns, embedded: dict[str, torch.Tensor]
    ) -> TaskResult:
        first, second = ("caption", "image") if task.kind == "image-text" else ("query", "positive")
        a, b, a_ids, b_ids = sides[first], sides[second], columns.ids[first], columns.ids[second]
        temperature: float | torch.Tensor
        if task.temperature is not None:
            temperature = task.temperature
        elif task.kind != "image-text":
            temperature = TEXT_TEMPERATURE
        elif "scale" in embedded:
            temperature = 1.0 / embedded["scale"]
        else:
            raise TrainingError(f"Task '{task.name}' needs a temperature, since the model has no logit_scale.")
        negatives = sides["negatives"].unflatten(0, (len(a), -1)) if "negatives" in sides else None
        function: Callable[..., torch.Tensor] = info_nce
        options: dict[str, Any] = dict(form=self.form, world=self.world)
        if task.loss == "sigmoid":
            function = sigmoid_loss
            options["bias"] = embedded.get("bias", -10.0)
        else:
            options |= dict(reduction=self.reduction, label_smoothing=task.label_smoothing)
        if task.kind == "text-triplet":
            function = info_nce_plus
        loss = matryoshka(function, task.matryoshka_dims) if task.matryoshka_dims else function
        if negatives is not None:
            value = loss(a, b, negatives, temperature, a_ids, b_ids, columns.ids["negatives"], **options)
        else:
            value = loss(a, b, temperature, a_ids, b_ids, **options)
        return TaskResult(value, _accuracy(a, b, negatives, columns, a_ids, b_ids))


@torch.no_grad()
def _accuracy(
    a: torch.Tensor,
    b: torch.Tensor,
    negatives: torch.Tensor | None,
    columns: Columns,
    a_ids: torch.Tensor,
    b_ids: torch.Tensor,
) -> torch.Tensor:
    a, b, a_ids, b_ids = (side[:_RATED] for side in (a, b, a_ids, b_ids))
    rows = slice(0, len(a))
    excluded = Exclusions(((a_ids, a_ids), (b_ids, b_ids), (a_ids, b_ids)), 0).matrix(rows, rows)
    assert excluded is not None
    scores = (a @ b.t()).masked_fill(excluded, -2.0)
    own = scores.diagonal()
    best = scores.masked_fill(torch.eye(len(a), dtype=torch.bool, device=a.device), -2.0).amax(1)
    if negatives is not None:
        hard = columns.ids["negatives"][:_RATED]
        known = (hard == b_ids[:, None]) | (hard == a_ids[:, None])
        to_negatives = torch.einsum("nd,nkd->nk", a, negatives[:_RATED]).masked_fill(known, -2.0)
        best = torch.maximum(best, to_negatives.amax(1))
    return (own > best).float().mean()
