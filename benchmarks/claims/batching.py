"""What a step sees: both tasks or one, and pairs that share an id."""

from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset

from benchmarks.claims.conditions import Condition, Phase
from benchmarks.claims.datasets import ClaimData, both_metrics
from benchmarks.claims.rules import R5, STS, Outcomes, Verdict, at_least
from bifocal.training.collator import JointBatch, content_id
from bifocal.training.engine.distributed import ProcessGroupInfo
from bifocal.training.losses.multi_task_loss import MultiTaskLoss
from bifocal.training.tasks import Task
from bifocal.training.trainer import MultiTaskTrainer

JOINT = "joint"

# Joint or alternating

_STEPS, _BATCH = 350, 128
BOTH = "both in every step"
SAME_UPDATES = "in turn, as many updates"
SAME_TIME = "in turn, as many samples and as much time"
SAME_SAMPLES = "in turn, as many samples and updates"


def alternating_conditions(data: ClaimData) -> list[Condition]:
    """Return joint steps, and steps of one modality each in turn, as sentence-transformers' ROUND_ROBIN makes them."""

    def condition(name: str, steps: int, batch: int = _BATCH, alternate: bool = True) -> Condition:
        options = {"alternate_modalities": alternate}
        phase = Phase(JOINT, lambda d: _photos_and_captions(d, batch), steps, options=options)
        return Condition(name, [phase], both_metrics, 8)

    return [
        condition(BOTH, _STEPS, alternate=False),
        condition(SAME_UPDATES, _STEPS),
        condition(SAME_TIME, 2 * _STEPS),
        condition(SAME_SAMPLES, _STEPS, 2 * _BATCH),
        # Added after the outcome, to explain it; not judged.
        condition("both in every step, half the batch, twice the updates", 2 * _STEPS, _BATCH // 2, False),
    ]


def _photos_and_captions(data: ClaimData, batch: int) -> list[Task]:
    return [
        Task("photos", "image-text", data.images.train, batch),
        Task("captions", "text-pair", data.captions.pairs, batch),
    ]


def judge_alternating(outcomes: Outcomes, data: ClaimData) -> Verdict:
    metrics = [data.images.metric, R5, *([] if data.sts is None else [STS])]
    return Verdict(
        [
            at_least(outcomes, metric, (BOTH, JOINT), (other, JOINT), bound, f"{metric}: {BOTH} against {other}")
            for other, bound in ((SAME_UPDATES, 0.0), (SAME_TIME, -0.01), (SAME_SAMPLES, -0.01))
            for metric in metrics
        ]
    )


# False negatives

_PHOTOS, _PAIRS = 2000, 51_200
BATCHES = (256, 1024)


class IdTrainer(MultiTaskTrainer):
    """A trainer whose losses recognise equal things by the groups of the tasks' rows, or not at all.

    Attributes:
        masks: whether rows of one group are excluded from each other's negatives.
    """

    masks = True

    def joint_loss(self, tasks: dict[str, Task], world: ProcessGroupInfo) -> MultiTaskLoss:
        return _IdLoss(self.masks, tasks, world, self.args.loss_impl, self.args.loss_reduction)


class UnmaskedTrainer(IdTrainer):
    """A trainer that takes every other row as a negative."""

    masks = False


class _IdLoss(MultiTaskLoss):
    def __init__(self, masks: bool, *args: Any) -> None:
        super().__init__(*args)
        self.masks = masks

    def __call__(self, embeddings: dict[str, torch.Tensor], batch: JointBatch) -> Any:
        for name, task_batch in batch["tasks"].items():
            groups = group_ids(self.tasks[name], task_batch.rows) if self.masks else task_batch.rows
            task_batch.ids = dict.fromkeys(task_batch.ids, torch.as_tensor(groups))
        return super().__call__(embeddings, batch)


def group_ids(task: Task, rows: Sequence[int]) -> list[int]:
    """Return an id per row: that of the photo of two captions, or that of the title of an image."""
    column = "photo" if task.kind == "text-pair" else "caption"
    return [content_id(str(value)) for value in task.dataset[list(rows)][column]]


def caption_pairs(data: ClaimData, photos: int = _PHOTOS) -> Dataset:
    """Return all pairs of captions of the first photos, with the number of the photo: ten pairs of five captions."""
    rows = [
        {"query": one, "positive": other, "photo": number}
        for number, texts in enumerate(data.captions.train[:photos])
        for first, one in enumerate(texts)
        for other in texts[first + 1 :]
    ]
    return Dataset.from_list(rows)


def false_negative_conditions(data: ClaimData) -> list[Condition]:
    pairs = caption_pairs(data)

    def tasks(batch: int) -> list[Task]:
        batches = [min(batch, len(rows)) for rows in (data.images.train, pairs)]
        return [
            Task("photos", "image-text", data.images.train, batches[0]),
            Task("captions", "text-pair", pairs, batches[1]),
        ]

    def condition(name: str, batch: int, trainer: Any) -> Condition:
        rate = 1.5e-3 * (batch / 256) ** 0.5  # the learning rate grows with the square root of the batch
        chunks = {"text_chunk_size": 256, "image_chunk_size": 256}  # bound the memory
        phase = Phase(JOINT, lambda d: tasks(batch), _PAIRS // batch, rate, options=chunks, trainer=trainer)
        return Condition(name, [phase], both_metrics, 8)

    return [
        condition(f"batch {batch:,}, {name}", batch, trainer)
        for batch in BATCHES
        for name, trainer in (("masked", IdTrainer), ("not masked", UnmaskedTrainer))
    ]


def judge_false_negatives(outcomes: Outcomes, data: ClaimData) -> Verdict:
    return Verdict(
        [
            at_least(
                outcomes, metric, (f"batch {batch:,}, masked", JOINT), (f"batch {batch:,}, not masked", JOINT), bound,
                f"{metric}: masked against not masked, batch {batch:,}",
            )
            for batch, bound in zip(BATCHES, (0.0, 0.01), strict=True)
            for metric in (data.images.metric, R5)
        ]
    )  # fmt: skip
