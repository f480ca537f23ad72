"""What a stage trains on: named tasks, each a data set with a kind, a batch size, a loss and a temperature."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

COLUMNS = {
    "image-text": ("image", "caption"),
    "text-pair": ("query", "positive"),
    "text-triplet": ("query", "positive", "negatives"),
}
# What a source can be read as: the kinds of tasks; texts alone for masked language modelling, pictures alone for
# captioning; pictures with labels and scored pairs of texts for evaluation.
KINDS = {
    **COLUMNS,
    "text-only": ("text",),
    "image-only": ("image",),
    "image-label": ("image", "label"),
    "scored-pair": ("first", "second", "score"),
}
LOSSES = ("info_nce", "sigmoid")
CAPTIONS = ("whole", "first sentence", "any sentence")
TEXT_TEMPERATURE = 0.05  # of text-text losses (arXiv 2405.20204, section 3.2)


class TrainingError(ValueError):
    """What stops a training run, in one sentence for the user."""


@dataclass(frozen=True)
class Task:
    """A data set and how it enters the joint loss.

    Each step sees one image-text batch and one text batch. Where several tasks are of one of these two sorts, one of
    them is drawn for each step, in proportion to its rows times its weight: a batch comes from one data set.

    Args:
        name: how the task is called in logs and errors.
        kind: "image-text", "text-pair" or "text-triplet".
        dataset: a `datasets.Dataset`, a `datasets.IterableDataset` or a `ShardStream` with the columns of its kind:
            `image` and `caption`; `query` and `positive`; or these and `negatives`, a list of hard negatives, as many
            in each row. Rows with the same `image_id`, if there is such a column, show the same picture. An image,
            caption, query or positive may itself be a list (several pictures of one thing, several captions of a
            picture): one is drawn at each use.
        batch_size: rows per step and process.
        weight: factor of its share of the steps, beside its rows.
        loss_weight: factor of its loss in the sum.
        temperature: tau of its loss; None means the model's learned temperature for image-text and 0.05 for texts.
        loss: "info_nce" (with negatives InfoNCE+) or, for image-text only, "sigmoid".
        label_smoothing: of InfoNCE.
        matryoshka_dims: also hold the loss for the first so many dimensions (arXiv 2205.13147); their list, the full
            number included.
        captions: "whole", "first sentence" (the short caption in a long one) or "any sentence", one drawn at each use.
        rows: how many rows a streamed data set has, where its share of the steps depends on it.
        max_bad: the share of rows that may turn out bad in training (pictures that cannot be read, broken rows of a
            stream); they are left out, and beyond this share the run stops.
        shuffle: how many rows of a stream are held by each reader and taken in random order; fewer where their pictures
            have more than 256 MiB.

    Raises:
        TrainingError: an unknown kind, loss or use of captions, a missing column, or fewer rows than a batch.
    """

    name: str
    kind: str
    dataset: Any
    batch_size: int
    weight: float = 1.0
    loss_weight: float = 1.0
    temperature: float | None = None
    loss: str = "info_nce"
    label_smoothing: float = 0.0
    matryoshka_dims: Sequence[int] | None = None
    captions: str = "whole"
    rows: int | None = None
    max_bad: float = 0.01
    shuffle: int = 1024

    def __post_init__(self) -> None:
        for field, known in (("kind", list(COLUMNS)), ("loss", list(LOSSES)), ("captions", list(CAPTIONS))):
            if getattr(self, field) not in known:
                raise TrainingError(
                    f"Task '{self.name}' has the unknown {field} '{getattr(self, field)}'; it must be one of {known}."
                )
        if self.loss == "sigmoid" and self.kind != "image-text":
            raise TrainingError(
                f"Task '{self.name}': the sigmoid loss is for image-text tasks; use 'info_nce' for texts."
            )
        for number in ("batch_size", "shuffle"):
            if getattr(self, number) < 1:
                raise TrainingError(f"Task '{self.name}' needs a {number} of at least 1, not {getattr(self, number)}.")
        names = self.dataset.column_names
        if names is not None:  # a stream may not know its columns before it is read
            missing = [column for column in COLUMNS[self.kind] if column not in names]
            if missing:
                raise TrainingError(
                    f"The data set of task '{self.name}' lacks the column '{missing[0]}' (it has "
                    f"{', '.join(names)}); rename or add it."
                )
        if not self.streams and len(self.dataset) < self.batch_size:
            raise TrainingError(
                f"The data set of task '{self.name}' has {len(self.dataset)} rows, fewer than its batch of "
                f"{self.batch_size}; give a smaller batch_size or more rows."
            )

    @property
    def sort(self) -> str:
        """ "image" or "text": each step has one task of each."""
        return "image" if self.kind == "image-text" else "text"

    @property
    def streams(self) -> bool:
        """Whether the data set is read in its own order instead of row by number."""
        return not hasattr(self.dataset, "__getitem__") or not hasattr(self.dataset, "__len__")

    @property
    def size(self) -> int | None:
        """Rows, where they are known."""
        return self.rows if self.rows is not None or self.streams else len(self.dataset)
