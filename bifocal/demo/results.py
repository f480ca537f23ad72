"""What the demo shows of a model: metrics on unseen symbols, example searches, and the report."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bifocal.demo.report import Gallery, Hit, Item, Report, Search, Stage, write_report
from bifocal.evaluation.relevance import right_answers
from bifocal.evaluation.retrieval import recall_at, recall_curve, relevant_ranks, retrieval_metrics, target_ranks
from bifocal.evaluation.rows import image_digest
from bifocal.modeling import BifocalModel, load_image

DIRECTIONS = {"text to image": ("name", "image"), "image to text": ("image", "name")}
_CURVE = 50
_HITS = 6


@dataclass
class Evaluation:
    """A model's vectors of unseen symbols and what they reach.

    Args:
        vectors: (symbols, dimensions) by "name", "long caption", "description" and "image".
        metrics: for the table of stages.
        recall: Recall@1 to Recall@50 by direction.
        keys: by the same names as the vectors, what equal texts and equal images share. Some symbols look alike to
            the pixel (Latin A, Greek Alpha); they are right answers of each other.
    """

    vectors: dict[str, np.ndarray]
    metrics: dict[str, float]
    recall: dict[str, list[float]]
    keys: dict[str, list[str]]

    def ranks(self, query: str, item: str) -> np.ndarray:
        """Return the rank at which each symbol finds the first right answer."""
        return target_ranks(
            self.vectors[query], self.vectors[item], query_keys=self.keys[query], item_keys=self.keys[item]
        )


def evaluate_symbols(model: BifocalModel, symbols: Any) -> Evaluation:
    """Search all of `symbols` (a split of the data set) by name, by image and from name to description."""
    first_images = [images[0] for images in symbols["images"]]
    keys = {
        "name": list(symbols["name"]),
        "long caption": [texts[0] for texts in symbols["long_captions"]],
        "description": [texts[0] for texts in symbols["descriptions"]],
    }
    vectors = {name: model.encode_text(texts, batch_size=128, show_progress=False) for name, texts in keys.items()}
    vectors["image"] = model.encode_image(first_images, batch_size=128, show_progress=False)
    keys["image"] = [image_digest(load_image(image)) for image in first_images]
    metrics: dict[str, float] = {}
    recall: dict[str, list[float]] = {}
    found_by = Evaluation(vectors, metrics, recall, keys)
    for direction, (query, item) in DIRECTIONS.items():
        ranks = found_by.ranks(query, item)
        at_k = retrieval_metrics(ranks)
        metrics |= {f"{direction} R@{k}": at_k[f"recall@{k}"] for k in (1, 5, 10)}
        recall[direction] = recall_curve(ranks, _CURVE)
    metrics["long caption to image R@5"] = recall_at(found_by.ranks("long caption", "image"), 5)
    to_description = found_by.ranks("name", "description")
    metrics |= {f"name to description R@{k}": recall_at(to_description, k) for k in (1, 5)}
    return found_by


def example_searches(evaluation: Evaluation, symbols: Any, seed: int, count: int = 8) -> list[Gallery]:
    """Return searches drawn at random, so that what goes wrong is shown as often as it happens."""
    first_images = [images[0] for images in symbols["images"]]
    signs = symbols["symbol"]
    items = {
        "name": [Item(name) for name in symbols["name"]],
        "description": [Item(texts[0]) for texts in symbols["descriptions"]],
        "image": [Item(None, image, sign) for image, sign in zip(first_images, signs, strict=True)],
        "named image": [
            Item(name, image, sign) for name, image, sign in zip(symbols["name"], first_images, signs, strict=True)
        ],
    }
    drawn = random.Random(seed).sample(range(len(symbols)), min(4 * count, len(symbols)))
    plan = (
        ("Images found by name", "name", "image", "named image"),
        ("Images found by a description in other words", "description", "image", "named image"),
        ("Names found by image", "image", "name", "name"),
        ("Descriptions found by name", "name", "description", "description"),
    )
    galleries = []
    for number, (title, query, item, shown) in enumerate(plan):
        right = right_answers(
            evaluation.keys[query], evaluation.keys[item], ((row, row) for row in range(len(symbols)))
        )
        searches = [
            _search(
                row, evaluation.vectors[query][row], items[query][row], evaluation.vectors[item], items[shown],
                right[row],
            )
            for row in drawn[number::4]
        ]  # fmt: skip
        shared = sum(len(answers) > 1 for answers in right)
        hits = sum(search.rank <= _HITS for search in searches)
        note = (
            f"{len(searches)} queries drawn at random among {len(symbols)} symbols that training never saw; for {hits} "
            f"of them the right answer (green) is among the first {_HITS}. The number is the cosine similarity."
        )
        if shared:
            note += f" {shared} symbols look like another one to the pixel; either is a right answer."
        galleries.append(Gallery(title, note, searches))
    return galleries


def _search(
    row: int, vector: np.ndarray, query: Item, vectors: np.ndarray, shown: Sequence[Item], right: Sequence[int]
) -> Search:
    scores = vectors @ vector
    best = np.argsort(-scores, kind="stable")[:_HITS]
    hits = [Hit(shown[other], float(scores[other]), int(other) in right) for other in best]
    rank = int(relevant_ranks(vector[None], vectors, [right])[0, 0])
    return Search(query, hits, shown[row], rank)


def searches_as_text(galleries: Sequence[Gallery], each: int = 3) -> str:
    """Return the first searches of each gallery for a terminal, images as the symbols they show."""
    lines = []
    for gallery in galleries:
        lines.append(f"\n{gallery.title}")
        for search in gallery.searches[:each]:
            hits = " | ".join(f"{'*' if hit.right else ''}{hit.item.label}" for hit in search.hits[:3])
            lines.append(f"  {search.query.label}\n    -> {hits}   (right answer at rank {search.rank})")
    return "\n".join(lines)


def write_demo_report(
    path: Path, stages: list[Stage], galleries: list[Gallery], figures: dict[str, str], settings: dict[str, Any]
) -> None:
    """Write the page `report.html` of a finished demo."""
    write_report(
        Report(
            title="Bifocal demo: one model that searches images and texts",
            summary=(
                "Two small towers trained from scratch through the three stages of Jina CLIP on the symbols of the "
                "DejaVu fonts. Everything below is measured on symbols that training never saw in any face; with 500 "
                "of them, chance is 0.2 % at the first place and 1 % among the first five."
            ),
            figures=figures,
            stages=stages,
            galleries=galleries,
            settings=settings,
        ),
        path,
    )
