"""From the rows of a step to the tensors the towers take."""

import hashlib
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image

from bifocal.modeling import BifocalProcessor, load_image

Augmentation = Callable[[Image.Image, random.Random], Image.Image]


def content_id(text: str) -> int:
    """A 63-bit number that equal texts share and different ones, for all practical purposes, do not."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


class MultiTaskCollator:
    """Draws one of several pictures or texts of a row, augments, tokenises and stacks.

    What is drawn at a step is a function of the seed, the step and the task.

    Args:
        processor: tokenizer and image processor.
        max_length: tokens kept of a text, special tokens included.
        seed: of the draws.
        augment: applied to each picture with a random generator.
    """

    def __init__(
        self, processor: BifocalProcessor, max_length: int, seed: int, augment: Augmentation | None = None
    ) -> None:
        self.processor = processor
        self.max_length = max_length
        self.seed = seed
        self.augment = augment

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """
        Args:
            items: exactly one item of `StepBatches`.

        Returns:
            For each task by name: the inputs of each of its columns (`pixel_values`, or `input_ids` and
            `attention_mask`; the negatives of all rows flattened) and integer `ids` of each column by which equal
            pictures and texts are known.
        """
        (item,) = items
        batch = {}
        for task, rows, columns in item["tasks"]:
            generator = random.Random(f"{self.seed}/{item['step']}/{task.name}")
            features: dict[str, Any] = {}
            ids: dict[str, torch.Tensor] = {}
            for column, values in columns.items():
                if column == "image":
                    features[column] = self._pictures(values, generator)
                    known = columns.get("image_id", rows.tolist())
                    ids[column] = torch.tensor([content_id(str(image_id)) for image_id in known])
                elif column == "negatives":
                    features[column] = self._texts([text for texts in values for text in texts])
                    ids[column] = torch.tensor([[content_id(text) for text in texts] for texts in values])
                elif column in ("caption", "query", "positive"):
                    texts = [generator.choice(value) if isinstance(value, list) else value for value in values]
                    features[column] = self._texts(texts)
                    ids[column] = torch.tensor([content_id(text) for text in texts])
            batch[task.name] = {"features": features, "ids": ids}
        return batch

    def _pictures(self, values: list[Any], generator: random.Random) -> dict[str, torch.Tensor]:
        pictures = []
        for value in values:
            chosen = generator.choice(value) if isinstance(value, list) else value
            if isinstance(chosen, dict):  # an undecoded `datasets.Image`
                chosen = chosen["bytes"] if chosen["bytes"] is not None else chosen["path"]
            picture = load_image(chosen)
            pictures.append(self.augment(picture, generator) if self.augment else picture)
        processor = self.processor.image_processor
        crop = processor.crop_size
        # Pictures of the wanted size pass resizing and cropping unchanged; leaving both out saves most of the time.
        fits = all(picture.size == (crop["width"], crop["height"]) for picture in pictures)
        resize = {"do_resize": False, "do_center_crop": False} if fits else {}
        return {"pixel_values": processor(pictures, return_tensors="pt", **resize)["pixel_values"]}

    def _texts(self, texts: list[str]) -> dict[str, torch.Tensor]:
        encoded = self.processor.tokenizer(
            texts, padding=True, truncation=True, max_length=self.max_length, return_tensors="pt"
        )
        return {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}
