"""What the switches of a training do: temperature of the texts, sum or mean of the directions, Matryoshka."""

from typing import Any

import numpy as np
import torch

from benchmarks.claims.conditions import Condition, Phase
from benchmarks.claims.datasets import ClaimData, both_metrics
from benchmarks.claims.rules import R5, STS, Outcomes, Verdict, at_least
from bifocal.evaluation.retrieval import recall_at, target_ranks
from bifocal.modeling import BifocalModel
from bifocal.training.engine.distributed import ProcessGroupInfo
from bifocal.training.losses.multi_task_loss import MultiTaskLoss
from bifocal.training.tasks import Task
from bifocal.training.trainer import MultiTaskTrainer

JOINT = "joint"
_STEPS, _BATCH = 120, 128
DEFAULT, COLD, LEARNED = "defaults (0.05, sum)", "text temperature 0.02", "text temperature learned with images'"
MEAN, MATRYOSHKA = "mean of the directions", "Matryoshka (16, 32, 64, 128)"
_DIMENSIONS = (16, 32, 64, 128)
SHORT = "text retrieval R@5, 16 dimensions"


class LearnedTemperatureTrainer(MultiTaskTrainer):
    """A trainer whose text losses have the learned temperature of the image-text losses."""

    def joint_loss(self, tasks: dict[str, Task], world: ProcessGroupInfo) -> MultiTaskLoss:
        return _LearnedTemperature(tasks, world, self.args.loss_impl, self.args.loss_reduction)


class _LearnedTemperature(MultiTaskLoss):
    @staticmethod
    def _temperature(task: Task, embeddings: dict[str, torch.Tensor]) -> float | torch.Tensor:
        return 1.0 / embeddings["scale"]


def switch_conditions(data: ClaimData) -> list[Condition]:
    def condition(
        name: str, temperature: float | None = None, trainer: Any = MultiTaskTrainer, dims: Any = None, **options: Any
    ) -> Condition:
        def tasks(data: ClaimData) -> list[Task]:
            return [
                Task("photos", "image-text", data.images.train, _BATCH, matryoshka_dims=dims),
                Task(
                    "captions", "text-pair", data.captions.pairs, _BATCH, matryoshka_dims=dims, temperature=temperature
                ),
            ]

        phase = Phase(JOINT, tasks, _STEPS, options=options, trainer=trainer)
        return Condition(name, [phase], _measure, 8)

    return [
        condition(DEFAULT),
        condition(COLD, 0.02),
        condition(LEARNED, trainer=LearnedTemperatureTrainer),
        condition(MEAN, loss_reduction="mean"),
        condition(MATRYOSHKA, dims=_DIMENSIONS),
    ]


def _measure(model: BifocalModel, data: ClaimData) -> dict[str, float]:
    """Return the metrics at full width, and text retrieval by the first dimensions."""
    queries, items = ([texts[number] for texts in data.captions.test] for number in (0, 1))
    vectors = [
        np.asarray(model.encode_text(texts, batch_size=128, truncate_dim=_DIMENSIONS[0], show_progress=False))
        for texts in (queries, items)
    ]
    ranks = target_ranks(vectors[0], vectors[1], query_keys=queries, item_keys=items)
    return {**both_metrics(model, data), SHORT: recall_at(ranks, 5)}


def judge_switches(outcomes: Outcomes, data: ClaimData) -> Verdict:
    default, matryoshka = (DEFAULT, JOINT), (MATRYOSHKA, JOINT)
    zero = data.images.metric
    texts = [R5, *([] if data.sts is None else [STS])]
    return Verdict(
        [
            *(
                at_least(outcomes, metric, default, (other, JOINT), -0.01, f"{metric}: {DEFAULT} against {other}")
                for other in (COLD, LEARNED, MEAN)
                for metric in (zero, *texts)
            ),
            *(
                at_least(outcomes, metric, matryoshka, default, -0.02, f"{metric}: {MATRYOSHKA} at full width")
                for metric in (zero, *texts)
            ),
            at_least(outcomes, SHORT, matryoshka, default, 0.05, f"{SHORT}: {MATRYOSHKA} against {DEFAULT}"),
        ]
    )
