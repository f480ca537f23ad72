"""`Task`: a data set with its kind, batch size, loss and temperature."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cache
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from bifocal.data.kinds import COLUMNS, TaskKind
from bifocal.errors import TrainingError
from bifocal.training.task_dataset import choose_negatives, column_names, task_data

TEXT_TEMPERATURE = 0.05  # of text-text losses (arXiv 2405.20204, section 3.2)


@dataclass(frozen=True)
class Task:
    """A data set and how it enters the joint loss.

    Each step sees one image-text batch and one text batch (or one of them: `alternate_modalities`). Where several tasks
    are of one of these two sorts, one of them is drawn for each step, in proportion to its rows times its
    `sampling_weight`: a batch comes from one data set.

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
        sampling_weight: factor of its share of the steps, in addition to its number of rows.
        loss_weight: factor of its loss in the sum.
        temperature: tau of its loss; None means the model's learned temperature for image-text and 0.05 for texts.
        loss: "info_nce" (with negatives InfoNCE+) or, for image-text only, "sigmoid". When None, "sigmoid" for
            image-text tasks of a model with SigLIP's bias, and "info_nce" for all others.
        label_smoothing: share of InfoNCE's target that is spread over all candidates.
        matryoshka_dims: numbers of first dimensions for which the loss is computed, the full number included (arXiv
            2205.13147).
        caption_mode: "whole", "first_sentence" (the short caption in a long one) or "any_sentence", one drawn at each
            use.
        num_rows: number of rows of a streamed data set, needed where its share of the steps depends on it.
        max_bad_fraction: share of rows that may be bad: an image that cannot be read, no text, too few negatives. They
            are skipped, counted and named in the run's skipped.jsonl; the run stops if there are more.
        shuffle_buffer_size: number of rows of a stream that each reader holds and takes in random order; fewer if their
            images have more than 256 MiB.
        num_negatives: how many hard negatives of each row are used, the first ones; rows with fewer are bad. None: the
            most that nearly all rows have, so that no more than `max_bad_fraction` of them are skipped.
        prompts: text that goes before each text of a column, by column: `{"query": "query: "}`; {} for none. When None,
            the model's own (`config.prompts`), if it has any: "query" for queries and captions (which search images),
            and "document" for positives and negatives.

    Raises:
        TrainingError: if a value is unknown or out of its range, a column is missing, or the data set is of a type
            that cannot be read row by row.

    Attributes:
        dataset: as `task_data` returns it: images undecoded, values plain.
    """

    name: str
    kind: TaskKind
    dataset: Any
    batch_size: Annotated[int, Field(ge=1)]
    sampling_weight: Annotated[float, Field(ge=0)] = 1.0
    loss_weight: Annotated[float, Field(ge=0)] = 1.0
    temperature: Annotated[float, Field(gt=0)] | None = None
    loss: Literal["info_nce", "sigmoid"] | None = None
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    matryoshka_dims: Sequence[Annotated[int, Field(ge=1)]] | None = None
    caption_mode: Literal["whole", "first_sentence", "any_sentence"] = "whole"
    num_rows: Annotated[int, Field(ge=1)] | None = None
    max_bad_fraction: Annotated[float, Field(ge=0, le=1)] = 0.01
    shuffle_buffer_size: Annotated[int, Field(ge=1)] = 1024
    num_negatives: Annotated[int, Field(ge=1)] | None = None
    prompts: dict[str, str] | None = None

    def __post_init__(self) -> None:
        self._check_values()
        if self.loss == "sigmoid" and self.kind != "image-text":
            raise TrainingError(
                f"Task '{self.name}': the sigmoid loss is for image-text tasks; use 'info_nce' for texts."
            )
        texts = [column for column in COLUMNS[self.kind] if column != "image"]
        unknown = next((column for column in self.prompts or {} if column not in texts), None)
        if unknown is not None:
            raise TrainingError(
                f"Task '{self.name}': prompts has the key '{unknown}', which is no column of texts; use "
                f"{', '.join(texts)}."
            )
        object.__setattr__(self, "dataset", task_data(self.dataset, self.name, self.kind))
        names = column_names(self.dataset)
        if names is not None:  # a stream may not know its columns before it is read
            missing = [column for column in COLUMNS[self.kind] if column not in names]
            if missing:
                raise TrainingError(
                    f"The data set of task '{self.name}' has no column '{missing[0]}' (it has "
                    f"{', '.join(names)}); rename or add it."
                )
        if self.kind == "text-triplet":
            negatives = choose_negatives(self.dataset, self.name, self.num_negatives, self.max_bad_fraction)
            object.__setattr__(self, "num_negatives", negatives)

    def _check_values(self) -> None:
        for field, adapter in _field_adapters().items():
            value = getattr(self, field)
            try:
                plain = value.item() if hasattr(value, "item") else value  # numpy's numbers
                valid = adapter.validate_python(plain)
            except ValidationError as error:
                problem = error.errors()[0]["msg"]
                raise TrainingError(f"Task '{self.name}': {field} is {value!r}. {problem}.") from None
            object.__setattr__(self, field, valid)

    @property
    def modality(self) -> str:
        """Return "image" or "text"; each step has one task of each (or of one: `alternate_modalities`)."""
        return "image" if self.kind == "image-text" else "text"

    @property
    def streams(self) -> bool:
        """Whether the data set is read in its own order instead of by row number."""
        return not hasattr(self.dataset, "__getitem__") or not hasattr(self.dataset, "__len__")

    @property
    def size(self) -> int | None:
        """Return the number of rows if it is known."""
        return self.num_rows if self.num_rows is not None or self.streams else len(self.dataset)


@cache
def _field_adapters() -> dict[str, TypeAdapter[Any]]:
    types: dict[str, Any] = {field.name: field.type for field in fields(Task) if field.name != "dataset"}
    return {name: TypeAdapter(its_type) for name, its_type in types.items()}
