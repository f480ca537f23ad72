"""Turns the rows of a step into the tensors that the towers take."""

import hashlib
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from PIL import Image

from bifocal.data.augmentation import ImageAugmentation
from bifocal.data.images import ImageReader, output_size
from bifocal.data.kinds import COLUMNS
from bifocal.data.row_names import row_name
from bifocal.data.skips import RowError, SkippedRow
from bifocal.errors import TrainingError
from bifocal.modeling import BifocalProcessor
from bifocal.modeling.processing_bifocal import private_tokenizer, token_ids
from bifocal.modeling.towers_bifocal import search_prompts
from bifocal.training.row_check import usable_row
from bifocal.training.task_dataset import is_missing, read_rows
from bifocal.training.tasks import Task

Augmentation = ImageAugmentation | Callable[[Image.Image, random.Random], Image.Image]
Inputs = dict[str, torch.Tensor]

# A bucket of texts ends where a text has fewer than this share of the tokens of the bucket's longest, if the bucket
# holds at least this many texts.
_SHORTEST, _FEWEST = 0.8, 8
_TRIES = 100  # to replace a row that cannot be used by another one
# After a full stop and spaces (also of Hindi, Arabic and Urdu), or after one that needs no space.
_SENTENCE_END = re.compile(r"(?<=[.!?।॥؟۔])\s+|(?<=[。！？｡])\s*(?=[^\s」』”’）])")


def skip_text(skip: SkippedRow) -> str:
    return f"{skip.cause}: {skip.detail}" if skip.detail else skip.cause


def content_id(text: str) -> int:
    """Return a 63-bit hash of a text; for all practical purposes, different texts have different ones."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def _image_key(name: Any, image_id: Any) -> str:
    """Return the key by which equal images are recognised: the `image_id`, or else the row itself."""
    return f"row {name}" if is_missing(image_id) else f"image {image_id}"


def column_prompts(prompts: dict[str, str] | None) -> dict[str, str]:
    """Return a model's prompts by the column of a task, as a search uses them: captions are queries for images.

    Args:
        prompts: prompts by name, as in a model's configuration.
    """
    roles = {"query": "query", "caption": "query", "positive": "document", "negatives": "document"}
    found = search_prompts(prompts)
    return {column: found[role] for column, role in roles.items() if role in found}


@dataclass
class TaskBatch:
    """The positions of a task's embeddings, and the ids by which equal images and texts are recognised.

    Args:
        rows: names of the rows, for errors.
        spans: first and last position (exclusive) of each column among all texts or all images of the step.
        ids: (rows,) integers of each column, (rows, negatives) of the negatives.
    """

    rows: list[Any]
    spans: dict[str, tuple[int, int]] = field(default_factory=dict)
    ids: dict[str, torch.Tensor] = field(default_factory=dict)


class JointBatch(dict):
    """What a step embeds, and what its losses need.

    Items:
        texts: the tower's inputs for all texts of all tasks, sorted by length and cut into buckets, so that little is
            padded.
        order: (texts,) position of each text among the sorted ones.
        images: the tower's inputs for all images, one entry per task with images.
        tasks: `TaskBatch` by task.
        step, position: the step, and where the streams stand after it (see `JointBatchStream`).
        skips: by task how many rows were read, the skipped ones, and files read to their end.
    """

    def to(self, device: Any, **options: Any) -> "JointBatch":
        moved = JointBatch(self)
        for kind in ("texts", "images"):
            moved[kind] = [{k: v.to(device, **options) for k, v in part.items()} for part in self[kind]]
        moved["order"] = self["order"].to(device)
        moved["tasks"] = {
            name: TaskBatch(c.rows, c.spans, {k: v.to(device) for k, v in c.ids.items()})
            for name, c in self["tasks"].items()
        }
        return moved

    def pin_memory(self) -> "JointBatch":
        for kind in ("texts", "images"):
            self[kind] = [{k: v.pin_memory() for k, v in part.items()} for part in self[kind]]
        return self


class MultiTaskCollator:
    """Draws one of several images or texts of a row, augments, tokenises and stacks.

    What is drawn at a step is a function of the seed, the step, the task and the process.

    Args:
        processor: tokenizer and image processor.
        max_length: tokens kept of a text, special tokens included.
        seed: seed of the draws.
        augment: an `ImageAugmentation`, or a function of an image and a random generator.
        rank: rank of the process.
        exact: hand images to the processor in full size (see `ImageReader`).
        skip: replace a row that cannot be used by another row of the data set.
        pad_to: tokens that every text is padded to, without an attention mask (see `padded_length`).
        prompts: texts before those of a column, for tasks without their own (see `column_prompts`).

    Attributes:
        bucketed: whether texts are cut into buckets of similar length; if not, all are padded to the longest.
    """

    bucketed = True

    def __init__(
        self,
        processor: BifocalProcessor,
        max_length: int,
        seed: int,
        augment: Augmentation | None = None,
        rank: int = 0,
        exact: bool = True,
        skip: bool = False,
        pad_to: int | None = None,
        prompts: dict[str, str] | None = None,
    ) -> None:
        self.processor = processor
        self.max_length = max_length
        self.seed = seed
        self.augment = augment
        self.rank = rank
        self.skip = skip
        self.pad_to = pad_to
        self.prompts = prompts or {}
        smallest = 1.0
        if isinstance(augment, ImageAugmentation):
            self.augment = replace(augment, side=output_size(processor.image_processor))
            smallest = augment.smallest_side
        self.image_reader = ImageReader(processor.image_processor, exact, augment is None, smallest)

    def __call__(self, items: Sequence[dict[str, Any] | None]) -> JointBatch | None:
        """Return the batch of a step; None for a step before the one to resume from.

        Args:
            items: exactly one item of `JointBatchDataset` or `JointBatchStream`.

        Raises:
            TrainingError: if a row cannot be used, with its task and name; with `skip`, if too few rows can.
        """
        (item,) = items
        if item is None:  # a step before the one to resume from
            return None
        texts: list[str] = []
        images: list[Inputs] = []
        tasks: dict[str, TaskBatch] = {}
        num_images = 0
        skips: dict[str, tuple[int, list[SkippedRow], int]] = dict(item.get("skips", {}))
        for task, names, columns in item["tasks"]:
            generator = random.Random(f"{self.seed}/{item['step']}/{task.name}/{self.rank}")
            names, rows, skipped = self._whole(task, names, columns, item["step"], generator)
            skips.setdefault(task.name, (len(rows), skipped, 0))
            task_batch = tasks[task.name] = TaskBatch(names)
            prompts = self.prompts if task.prompts is None else task.prompts
            for column in COLUMNS[task.kind]:
                values = [row[column] for row in rows]
                prompt = prompts.get(column, "")  # equal texts are recognised without it
                if column == "image":
                    images.append(self.image_reader.inputs(values))
                    task_batch.spans[column] = (num_images, num_images + len(values))
                    num_images += len(values)
                    known = [_image_key(name, row.get("image_id")) for name, row in zip(names, rows, strict=True)]
                    task_batch.ids[column] = torch.tensor([content_id(key) for key in known])
                elif column == "negatives":
                    flat = [text for negatives in values for text in negatives]
                    task_batch.spans[column] = (len(texts), len(texts) + len(flat))
                    texts += [prompt + text for text in flat]
                    task_batch.ids[column] = torch.tensor([content_id(text) for text in flat]).view(len(values), -1)
                else:
                    drawn = [self._one_of(task, column, value, generator) for value in values]
                    task_batch.spans[column] = (len(texts), len(texts) + len(drawn))
                    texts += [prompt + text for text in drawn]
                    task_batch.ids[column] = torch.tensor([content_id(text) for text in drawn])
        buckets, order = self._buckets(texts)
        return JointBatch(
            texts=buckets, order=order, images=images, tasks=tasks, step=item["step"], position=item.get("position"),
            skips=skips,
        )  # fmt: skip

    def examples(self, device: Any) -> tuple[list[Inputs], list[Inputs]]:
        """Return the inputs of a short text and of a blank image on a device."""
        parts = self._buckets(["a"])[0], [self.image_reader.inputs([Image.new("RGB", (64, 64))])]
        texts, images = ([{name: v.to(device) for name, v in inputs.items()} for inputs in part] for part in parts)
        return texts, images

    @staticmethod
    def _one_of(task: Task, column: str, value: str | list[str], generator: random.Random) -> str:
        text = generator.choice(value) if isinstance(value, list) else value
        if column == "caption" and task.caption_mode != "whole":
            sentences = _SENTENCE_END.split(text.strip())
            text = sentences[0] if task.caption_mode == "first_sentence" else generator.choice(sentences)
        return text

    def usable(
        self, task: Task, names: Sequence[Any], columns: dict[str, Any], decode: Callable[[Any], Any] | None = None
    ) -> tuple[list[dict[str, Any] | None], list[SkippedRow]]:
        """Return each row as the collator takes it, None for those that cannot be used, and why not.

        Args:
            decode: reads the image of a row; all images of a row when None.
        """
        decode = self.image_reader.decode if decode is None else decode
        rows: list[dict[str, Any] | None] = []
        skipped = []
        for number, name in enumerate(names):
            values = {column: values_of_column[number] for column, values_of_column in columns.items()}
            try:
                rows.append(usable_row(task, values, decode))
            except RowError as error:
                rows.append(None)
                skipped.append(SkippedRow.of(row_name(task.dataset, name), error))
        return rows, skipped

    def _whole(
        self, task: Task, names: Sequence[Any], columns: dict[str, Any], step: int, generator: random.Random
    ) -> tuple[list[Any], list[dict[str, Any]], list[SkippedRow]]:
        """Return the names and rows of a batch; with `skip`, other rows replace those that cannot be used.

        Of several images of a row one is drawn, and only that one is decoded and augmented.
        """

        def decode(value: Any) -> Any:
            image = self.image_reader.decode(value, generator.choice)
            return self.augment(image, generator) if self.augment else image

        names = list(names)
        rows, skipped = self.usable(task, names, columns, decode)
        for number, row in enumerate(rows):
            if row is not None:
                continue
            if task.streams or not self.skip:  # a stream skips such rows before they come here
                raise TrainingError(
                    f"Row {skipped[0].row} of task '{task.name}' cannot be used ({skip_text(skipped[0])}); "
                    "correct or remove it."
                )
            draws = random.Random(f"{self.seed}/{step}/{task.name}/{self.rank}/{names[number]}")
            for _ in range(_TRIES):
                other = draws.randrange(len(task.dataset))
                if other in names:
                    continue
                values = read_rows(task.dataset, [other])
                (rows[number],), problems = self.usable(task, [other], values, decode)
                skipped += problems
                if rows[number] is not None:
                    names[number] = other
                    break
            else:
                raise TrainingError(
                    f"Task '{task.name}' has too few rows that can be used: none of {len(skipped)} tried for one batch "
                    f"can ({skip_text(skipped[-1])})."
                )
        return names, cast(list[dict[str, Any]], rows), skipped

    def _buckets(self, texts: list[str]) -> tuple[list[Inputs], torch.Tensor]:
        """Return token ids and attention masks of the texts, longest first, in buckets of similar length."""
        if not texts:
            return [], torch.empty(0, dtype=torch.long)
        tokenizer = self.processor.tokenizer
        # Other threads may use the same tokenizer with other options.
        encoded, _ = token_ids(private_tokenizer(tokenizer), texts, self.max_length)
        if self.pad_to is not None:
            ids = _padded(encoded, self.pad_to, tokenizer.pad_token_id or 0)
            return [{"input_ids": ids}], torch.arange(len(texts))
        longest_first = sorted(range(len(texts)), key=lambda text: (-len(encoded[text]), text))
        order = torch.empty(len(texts), dtype=torch.long)
        order[torch.tensor(longest_first)] = torch.arange(len(texts))
        buckets: list[list[int]] = [[]]
        for text in longest_first:
            current = buckets[-1]
            if self.bucketed and len(current) >= _FEWEST and len(encoded[text]) < _SHORTEST * len(encoded[current[0]]):
                buckets.append([])
            buckets[-1].append(text)
        if len(buckets) > 1 and len(buckets[-1]) < _FEWEST:
            buckets[-2].extend(buckets.pop())
        padded = []
        for bucket in buckets:
            longest = len(encoded[bucket[0]])
            ids = _padded([encoded[text] for text in bucket], longest, tokenizer.pad_token_id or 0)
            lengths = torch.tensor([len(encoded[text]) for text in bucket])
            mask = (torch.arange(longest) < lengths[:, None]).long()
            padded.append({"input_ids": ids, "attention_mask": mask})
        return padded, order


def _padded(rows: Sequence[list[int]], length: int, padding: int) -> torch.Tensor:
    return torch.tensor([tokens + [padding] * (length - len(tokens)) for tokens in rows])
