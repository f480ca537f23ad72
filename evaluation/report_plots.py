"""Plots of the evaluation report."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from bifocal.evaluation.compression import by_dimension
from bifocal.evaluation.modality_gap import ModalityGap, measure_gap
from bifocal.evaluation.protocols import Result
from bifocal.evaluation.relevance import caption_answers
from bifocal.evaluation.retrieval import recall_curve
from bifocal.pages import COLOURS, new_figure, svg

_LAST_K = 50  # end of the recall curves
_MAP_PAIRS = 400
_SIMILARITY_PAIRS = 14
Plot = dict[str, str]


def right_images(result: Result) -> list[list[int]]:
    """Return the right images of each text."""
    owner, texts, images = (result.arrays[name] for name in ("owner", "text_ids", "image_ids"))
    return caption_answers(owner, texts, images)[0]


def distinct_pairs(result: Result) -> tuple[np.ndarray, np.ndarray]:
    """Return the images and the first text of each, without pairs whose image or text is a duplicate."""
    owner, text_ids, image_ids = (result.arrays[name] for name in ("owner", "text_ids", "image_ids"))
    first = np.unique(owner, return_index=True)[1]
    seen: set[tuple[str, int]] = set()
    kept = []
    for image, text in enumerate(first.tolist()):
        contents = {("image", int(image_ids[image])), ("text", int(text_ids[text]))}
        if not contents & seen:
            kept.append(image)
        seen |= contents
    return result.arrays["images"][kept], result.arrays["texts"][first[kept]]


def gap_of(result: Result) -> ModalityGap | None:
    """Return the modality gap; None if there are fewer than four distinct pairs."""
    images, texts = distinct_pairs(result)
    return measure_gap(images, texts) if len(images) >= 4 else None


def recall_plot(measured: Mapping[str, Result]) -> Plot:
    figure, axes = new_figure()
    for number, (model, result) in enumerate(measured.items()):
        for style, (name, array) in zip(
            ("-", "--"), (("text to image", "to_image"), ("image to text", "to_text")), strict=True
        ):
            values = recall_curve(result.arrays[array], min(_LAST_K, len(result.arrays["images"])))
            label = f"{model}, {name}" if len(measured) > 1 else name
            axes.plot(range(1, len(values) + 1), values, style, color=COLOURS[number % len(COLOURS)], label=label)
    axes.set_ylim(0, 1)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_formatter(lambda value, _: "")
    axes.set_xlabel("k")
    axes.set_ylabel("Recall@k (any caption)")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    return {"title": "Recall@k", "uri": svg(figure), "alt": f"Recall at k of {', '.join(measured)}, both directions."}


def gap_plot(gap: ModalityGap) -> Plot:
    figure, axes = new_figure()
    names = {
        "matching": "an image and its text", "image-text": "an image and another text",
        "image-image": "two images", "text-text": "two texts",
    }  # fmt: skip
    edges = np.linspace(min(v.min() for v in gap.similarities.values()), 1.0, 61)
    for number, (name, label) in enumerate(names.items()):
        options: Any = {"density": True, "histtype": "step", "linewidth": 1.5, "label": label}
        axes.hist(gap.similarities[name], bins=edges, color=COLOURS[number], **options)
    axes.set_xlabel("cosine similarity")
    axes.set_ylim(top=axes.get_ylim()[1] * 1.35)  # room for the legend
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    means = gap.metrics
    alt = (
        f"Histograms of cosine similarities: matching pairs {means['matching_cosine']:.2f} on average, other pairs of "
        f"an image and a text {means['image_text_cosine']:.2f}, two texts {means['text_text_cosine']:.2f}."
    )
    return {"title": "Similarities by kind", "uri": svg(figure), "alt": alt}


def map_plot(result: Result) -> Plot:
    """Plot texts and images by their first two principal components."""
    figure, axes = new_figure()
    images, texts = _sample(*distinct_pairs(result), _MAP_PAIRS)
    both = np.concatenate([images, texts])
    both = both - both.mean(0)
    _, _, components = np.linalg.svd(both, full_matrices=False)
    points = both @ components[:2].T
    image_points, text_points = points[: len(images)], points[len(images) :]
    for image, text in list(zip(image_points, text_points, strict=True))[:60]:
        axes.plot(*zip(image, text, strict=True), color="#c8ccd4", linewidth=0.6, zorder=0)
    axes.scatter(*image_points.T, s=9, color=COLOURS[0], label="images", linewidths=0)
    axes.scatter(*text_points.T, s=9, color=COLOURS[1], label="texts", linewidths=0)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.legend(frameon=False, fontsize=8)
    distance = np.linalg.norm(images.mean(0) - texts.mean(0))
    alt = f"Map of texts and images in two dimensions; their means are {distance:.2f} apart. Lines join some pairs."
    return {"title": "Map of texts and images", "uri": svg(figure), "alt": alt}


def _sample(images: np.ndarray, texts: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    rows = np.linspace(0, len(images) - 1, min(most, len(images))).astype(int)
    return images[rows], texts[rows]


def similarity_plot(result: Result) -> Plot:
    figure, axes = new_figure()
    images, texts = _sample(*distinct_pairs(result), _SIMILARITY_PAIRS)
    scores = texts @ images.T
    heat_map = axes.imshow(scores, cmap="Blues")
    axes.set_xlabel("images")
    axes.set_ylabel("their texts")
    axes.set_xticks([])
    axes.set_yticks([])
    figure.colorbar(heat_map, ax=axes, fraction=0.046)
    right = float((scores.argmax(1) == np.arange(len(texts))).mean())
    alt = f"Similarities of {len(texts)} texts and images; for {right:.0%} of the texts their image is the nearest."
    return {"title": "Similarities of a sample", "uri": svg(figure), "alt": alt}


def dimensions_plot(measured: Mapping[str, Result]) -> Plot:
    figure, axes = new_figure()
    at_full_length = []
    for number, (model, result) in enumerate(measured.items()):
        curve = by_dimension(result.arrays["texts"], result.arrays["images"], right_images(result))
        axes.plot(
            list(curve), list(curve.values()), "o-", color=COLOURS[number % len(COLOURS)], label=model, markersize=4
        )
        at_full_length.append(f"{model} {list(curve.values())[-1]:.2f} with all {list(curve)[-1]}")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("dimensions kept")
    axes.set_ylabel("text to image Recall@5")
    axes.grid(alpha=0.3)
    if len(measured) > 1:
        axes.legend(frameon=False, fontsize=8)
    return {
        "title": "Shortened vectors",
        "uri": svg(figure),
        "alt": f"Recall at 5 by number of dimensions: {'; '.join(at_full_length)}.",
    }


def scatter_plot(result: Result) -> Plot:
    figure, axes = new_figure()
    axes.scatter(result.arrays["human"], result.arrays["cosine"], s=7, alpha=0.35, color=COLOURS[0], linewidths=0)
    axes.set_xlabel("human score")
    axes.set_ylabel("cosine similarity")
    alt = f"Cosine similarity against human score; Spearman {result.metrics['spearman']:.3f}."
    return {"title": "Similarity against human score", "uri": svg(figure), "alt": alt}


def confusion_plot(result: Result) -> Plot:
    figure, axes = new_figure()
    labels, predicted = result.arrays["labels"], result.arrays["scores"].argmax(1)
    count = result.arrays["scores"].shape[1]
    table = np.zeros((count, count))
    np.add.at(table, (labels, predicted), 1)
    table /= np.maximum(table.sum(1, keepdims=True), 1)
    heat_map = axes.imshow(table, cmap="Blues", vmin=0, vmax=1)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("class")
    figure.colorbar(heat_map, ax=axes, fraction=0.046)
    return {
        "title": "Confusion matrix",
        "uri": svg(figure),
        "alt": f"Confusion matrix of {count} classes; {result.metrics['accuracy']:.0%} right.",
    }


def ranks_plot(measured: Mapping[str, Result]) -> Plot:
    figure, axes = new_figure()
    for number, (model, result) in enumerate(measured.items()):
        ranks = result.arrays["ranks"]
        values = recall_curve(ranks, min(_LAST_K, int(ranks.max())))
        axes.plot(range(1, len(values) + 1), values, color=COLOURS[number % len(COLOURS)], label=model)
    axes.set_ylim(0, 1)
    axes.set_xlabel("k")
    axes.set_ylabel("Recall@k (any relevant passage)")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    return {
        "title": "Recall@k",
        "uri": svg(figure),
        "alt": f"Recall at k of {', '.join(measured)}.",
    }
