"""What a stage trains on: named tasks, each a data set with a kind, a batch size, a weight and a temperature."""

from dataclasses import dataclass
from typing import Any

COLUMNS = {
    "image-text": ("image", "caption"),
    "text-pair": ("query", "positive"),
    "text-triplet": ("query", "positive", "negatives"),
}


@dataclass(frozen=True)
class Task:
    """One summand of a stage's loss.

    Args:
        name: how the task is called in logs and errors.
        kind: "image-text", "text-pair" or "text-triplet".
        dataset: a `datasets.Dataset` with the columns of its kind: `image` and `caption`; `query` and `positive`; or
            these and `negatives`, a list of hard negatives, as many in each row. Rows with the same `image_id`, if
            there is such a column, show the same picture. An image, caption, query or positive may itself be a list
            (several pictures of one thing, several captions of a picture): one is drawn at each use.
        batch_size: rows per step.
        weight: factor of its loss in the sum.
        temperature: tau of its loss; the model's learned temperature when None.

    Raises:
        ValueError: an unknown kind, a missing column, or fewer rows than a batch.
    """

    name: str
    kind: str
    dataset: Any
    batch_size: int
    weight: float = 1.0
    temperature: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in COLUMNS:
            raise ValueError(
                f"Task '{self.name}' has the unknown kind '{self.kind}'; it must be one of {list(COLUMNS)}."
            )
        missing = [column for column in COLUMNS[self.kind] if column not in self.dataset.column_names]
        if missing:
            raise ValueError(
                f"The data set of task '{self.name}' lacks the column '{missing[0]}' (it has "
                f"{', '.join(self.dataset.column_names)}); rename or add it."
            )
        if len(self.dataset) < self.batch_size:
            raise ValueError(
                f"The data set of task '{self.name}' has {len(self.dataset)} rows, fewer than its batch of "
                f"{self.batch_size}; give a smaller batch_size or more rows."
            )
