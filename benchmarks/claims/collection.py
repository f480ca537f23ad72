"""A collection of images with short titles and tags, as people have them: clip art, or symbols in its place."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from datasets import Image as ImageFeature

from bifocal.evaluation.retrieval import recall_at, target_ranks
from bifocal.evaluation.rows import image_digest
from bifocal.modeling import BifocalModel, load_image

FILES = ("clipart/train.parquet", "clipart/validation.parquet")
TITLE, IMAGE = "title finds image R@5", "image finds title R@5"


@dataclass
class Collection:
    """Images with titles.

    Args:
        train: data set with `image` and `caption`, one or more texts per image.
        images: test images.
        titles: title of each test image.
    """

    train: Any
    images: Sequence[Any]
    titles: Sequence[str]


def has_collection(folder: Path) -> bool:
    """Return whether a folder in the layout of `--data` holds clip art."""
    return all((folder / name).exists() for name in FILES)


def read_collection(folder: Path) -> Collection:
    """Return the clip art of a folder. A training image has two texts: its title, and its title with its tags."""
    train, test = (Dataset.from_parquet(str(folder / name)) for name in FILES)
    captions = [
        [title, f"{title}, {', '.join(tags)}"] if tags else [title]
        for title, tags in zip(train["title"], train["tags"], strict=True)
    ]
    captioned = Dataset.from_dict({"image": train["image"], "caption": captions})
    return Collection(
        captioned.cast_column("image", ImageFeature(decode=False)),
        [value["bytes"] if isinstance(value, dict) else value for value in test["image"]],
        list(test["title"]),
    )


def collection_metrics(model: BifocalModel, collection: Collection) -> dict[str, float]:
    """Return Recall@5 from titles to images and back. Equal titles and equal images are right answers of each other."""
    images = [load_image(image) for image in collection.images]
    digests = [image_digest(image) for image in images]
    image_vectors = model.encode_image(images, batch_size=128, show_progress=False)
    title_vectors = model.encode_text(list(collection.titles), batch_size=128, show_progress=False)
    to_images = target_ranks(title_vectors, image_vectors, query_keys=collection.titles, item_keys=digests)
    to_titles = target_ranks(image_vectors, title_vectors, query_keys=digests, item_keys=collection.titles)
    return {TITLE: recall_at(to_images, 5), IMAGE: recall_at(to_titles, 5)}
