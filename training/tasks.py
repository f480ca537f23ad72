"""What a stage trains on: named tasks, each a data set with a kind, a batch size, a loss and a temperature."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bifocal.data.kinds import COLUMNS
from bifocal.errors import TrainingError

LOSSES = ("info_nce", "sigmoid")
CAPTIONS = ("whole", "first sentence", "any sentence")
TEXT_TEMPERATURE = 0.05  # of text-text losses (arXiv 2405.20204, section 3.2)


@dataclass(frozen=True)
class Task:
    """A data set and how it enters the joint loss.

    Each step sees one image-text batch and one text batch. Where several tasks are of one of these two sorts, one of
    them is drawn for each step, in proportion to its rows times its weight: a batch comes from one data set.

    Args:
        name: how the task is called in logs and errors.
        kind: "image-text", "text-pair" or "text-triplet".
        dataset: a `datasets.Dataset` (its format, such as "numpy", does not matter, and broken images cost only their
            rows), a `datasets.IterableDataset`, a `ShardStream`, or dicts by number: a list, a torch `Dataset`, a
            pandas DataFrame, read row by row. Its columns are those of its kind: `image` and `caption`; `query` and
            `positive`; or these and `negatives`, a list of hard negatives. Rows with the same `image_id`, if there is
            such a column, show the same image. An image, caption, query or positive may itself be a list (several
            images of one thing, several captions of an image): one is drawn at each use.
        batch_size: rows per step and process; for evaluation, rows that are compared with each other.
        weight: factor of its share of the steps, beside its rows.
        loss_weight: factor of its loss in the sum.
        temperature: tau of its loss; None means the model's learned temperature for image-text and 0.05 for texts.
        loss: "info_nce" (with negatives InfoNCE+) or, for image-text only, "sigmoid".
        label_smoothing: of InfoNCE.
        matryoshka_dims: also hold the loss for the first so many dimensions (arXiv 2205.13147); their list, the full
            number included.
        captions: "whole", "first sentence" (the short caption in a long one) or "any sentence", one drawn at each use.
        rows: how many rows a streamed data set has, where its share of the steps depends on it.
        max_bad: the share of rows that may turn out bad: an image that cannot be read, no text, too few negatives. They
            are skipped, counted and named in the run's skipped.jsonl, and beyond this share the run stops.
        shuffle: how many rows of a stream are held by each reader and taken in random order; fewer where their pictures
            have more than 256 MiB.
        num_negatives: how many hard negatives of each row are used, the first ones; rows with fewer are bad. None: the
            most that nearly all rows have, so that no more than `max_bad` of them are skipped.

    Raises:
        TrainingError: if a kind, loss or use of captions is unknown, a column is missing, or the data set is of a type
            that cannot be read row by row.

    Attributes:
        dataset: what was given, made readable by `task_data`: images undecoded, values plain.
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
    num_negatives: int | None = None

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
        for number in ("batch_size", "shuffle", "num_negatives"):
            count = getattr(self, number)
            if count is not None and count < 1:
                raise TrainingError(f"Task '{self.name}' needs a {number} of at least 1, not {count}.")
        # Imported here, since it raises the errors that are defined above.
        from bifocal.training.task_dataset import choose_negatives, column_names, task_data

        object.__setattr__(self, "dataset", task_data(self.dataset, self.name, self.kind))
        names = column_names(self.dataset)
        if names is not None:  # a stream may not know its columns before it is read
            missing = [column for column in COLUMNS[self.kind] if column not in names]
            if missing:
                raise TrainingError(
                    f"The data set of task '{self.name}' lacks the column '{missing[0]}' (it has "
                    f"{', '.join(names)}); rename or add it."
                )
        if self.kind == "text-triplet":
            negatives = choose_negatives(self.dataset, self.name, self.num_negatives, self.max_bad)
            object.__setattr__(self, "num_negatives", negatives)

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
