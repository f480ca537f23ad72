"""One self-contained HTML page about what models reach: side by side, and each data set in pictures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from bifocal.evaluation.compression import by_dimension, by_precision
from bifocal.evaluation.gap import modality_gap
from bifocal.evaluation.plots import COLOURS, blank, svg
from bifocal.evaluation.protocols import Result
from bifocal.evaluation.retrieval import recall_at
from bifocal.files import overwrite

EVALUATION = "evaluation"  # kind of the page and of the numbers beside it
_CURVE = 50
_MAPPED = 400  # pairs in the two-dimensional map
_HEATED = 14  # pairs in the heat map
Plot = dict[str, str]


def write_evaluation_page(results: Mapping[str, Sequence[Result]], path: Path, title: str) -> None:
    """Render the page. It needs no other file and asks for nothing over the network.

    Args:
        results: of each model, the same tasks in the same order.

    Raises:
        NotOursError: if a file is there that is no such page, or that was changed since it was written.
        OSError: if the page cannot be written.
    """
    from jinja2 import Environment, PackageLoader

    results = dict(zip(_labels(list(results)), results.values(), strict=True))
    environment = Environment(loader=PackageLoader("bifocal.evaluation"), autoescape=True, trim_blocks=True)
    page = environment.get_template("evaluation.html.j2").render(
        title=title,
        models=list(results),
        headline=_headline(results),
        side=_side_by_side(results),
        sections=[_section(results, number) for number in range(len(next(iter(results.values()))))],
        speed=_speed(results),
        published=yaml.safe_load((Path(__file__).parent / "published.yaml").read_text(encoding="utf-8")),
    )
    with overwrite(path, EVALUATION) as scratch:
        scratch.write_text(page, encoding="utf-8", errors="backslashreplace")


def summary(results: Mapping[str, Sequence[Result]]) -> dict[str, Any]:
    """The page's numbers, for machines: by model and task every metric, sizes and speed, gap and compression."""
    found: dict[str, Any] = {}
    for model, measured in results.items():
        found[model] = {}
        for result in measured:
            if not result.metrics:
                continue
            entry: dict[str, Any] = {
                "kind": result.kind, "main": result.main, "metrics": result.metrics, "sizes": result.sizes,
                "seconds": result.seconds, "parameters": result.parameters, "speed": result.speed,
            }  # fmt: skip
            if "owner" in result.arrays:
                entry |= _extras(result)
            found[model][result.task] = entry
    return found


def _extras(result: Result) -> dict[str, Any]:
    """What is computed of the embeddings of an image-text task: modality gap, quality by dimension and precision."""
    images, texts, owner = (result.arrays[name] for name in ("images", "texts", "owner"))
    relevant = owner[:, None].tolist()
    first = np.unique(owner, return_index=True)[1]
    return {
        "gap": modality_gap(images, texts[first]).metrics if len(images) >= 4 else {},
        "recall_by_dimension": by_dimension(texts, images, relevant),
        "recall_by_precision": by_precision(texts, images, relevant),
    }


def _labels(paths: list[str]) -> list[str]:
    """The last two parts of each model's path, or the whole where these are the same."""
    short = ["/".join(Path(path).parts[-2:]) for path in paths]
    return short if len(set(short)) == len(short) else paths


def _headline(results: Mapping[str, Sequence[Result]]) -> dict[str, str]:
    first = next(iter(results.values()))
    return {f"{r.task}: {_spelt(r.main)}": f"{r.metrics[r.main]:.3f}" for r in first if r.metrics}


def _spelt(metric: str) -> str:
    return metric.replace("_", " ").replace("/", ", ")


def _side_by_side(results: Mapping[str, Sequence[Result]]) -> list[dict[str, Any]]:
    rows = []
    for measured in zip(*results.values(), strict=True):
        values = [result.metrics[result.main] if result.metrics else None for result in measured]
        best = max((value for value in values if value is not None), default=None)
        cells = [("" if value is None else f"{value:.3f}", len(values) > 1 and value == best) for value in values]
        one = next((result for result in measured if result.metrics), measured[0])
        facts = ", ".join(f"{count:,} {what}" for what, count in one.sizes.items() if count and what != "dimensions")
        rows.append({"task": one.task, "metric": _spelt(one.main), "cells": cells, "facts": facts})
    return rows


def _speed(results: Mapping[str, Sequence[Result]]) -> list[dict[str, Any]]:
    rows = []
    for model, measured in results.items():
        dimensions = next((result.sizes["dimensions"] for result in measured if "dimensions" in result.sizes), None)
        rates: dict[str, list[float]] = {}
        for result in measured:
            for name, rate in result.speed.items():
                rates.setdefault(name, []).append(rate)
        rows.append({
            "model": model, "parameters": f"{max(result.parameters for result in measured) / 1e6:,.1f} M",
            "dimensions": dimensions, "bytes": None if dimensions is None else 4 * dimensions,
            "texts": _rate(rates.get("texts_per_second")), "pictures": _rate(rates.get("pictures_per_second")),
            "seconds": f"{sum(result.seconds for result in measured):,.0f}",
        })  # fmt: skip
    return rows


def _rate(rates: list[float] | None) -> str | None:
    return None if not rates else f"{max(rates):,.0f}"


def _section(results: Mapping[str, Sequence[Result]], number: int) -> dict[str, Any]:
    everyone = {model: found[number] for model, found in results.items()}
    measured = {model: result for model, result in everyone.items() if result.metrics}
    if not measured:
        first = next(iter(everyone.values()))
        return {
            "task": first.task,
            "kind": "no model here embeds what it needs",
            "models": [],
            "metrics": [],
            "plots": [],
        }
    first = next(iter(measured.values()))
    names = list(dict.fromkeys(name for result in measured.values() for name in result.metrics))
    metrics = [(_spelt(n), [f"{r.metrics[n]:.4f}" if n in r.metrics else "" for r in measured.values()]) for n in names]
    section: dict[str, Any] = {
        "task": first.task, "kind": first.kind, "models": list(measured), "metrics": metrics, "plots": [],
    }  # fmt: skip
    if "owner" in first.arrays:
        section["plots"] = [
            _recall_curves(measured),
            _gap_plot(first),
            _map(first),
            _heat(first),
            _dimensions(measured),
        ]
        section["gaps"] = _gap_rows(measured)
        section["precisions"] = _precision_rows(measured)
        section["failures"] = [(model, result.examples) for model, result in measured.items()]
    elif "human" in first.arrays:
        section["plots"] = [_scatter(first)]
    elif "scores" in first.arrays:
        section["plots"] = [_confusion(first)]
    elif "ranks" in first.arrays:
        section["plots"] = [_ranks(measured)]
    return section


def _gap_rows(measured: Mapping[str, Result]) -> list[tuple[str, list[str]]]:
    gaps = [modality_gap(r.arrays["images"], r.arrays["texts"][_first(r)]).metrics for r in measured.values()]
    return [(_spelt(name), [f"{gap[name]:.3f}" for gap in gaps]) for name in gaps[0]]


def _first(result: Result) -> np.ndarray:
    """The number of each picture's first text."""
    return np.unique(result.arrays["owner"], return_index=True)[1]


def _precision_rows(measured: Mapping[str, Result]) -> list[tuple[str, list[str]]]:
    found = [
        by_precision(r.arrays["texts"], r.arrays["images"], r.arrays["owner"][:, None].tolist())
        for r in measured.values()
    ]
    names = list(dict.fromkeys(name for one in found for name in one))
    return [
        (name, [f"{one[name]['recall']:.3f} ({one[name]['bytes']:,.0f} bytes)" if name in one else "" for one in found])
        for name in names
    ]


# Plots


def _recall_curves(measured: Mapping[str, Result]) -> Plot:
    figure, axes = blank()
    for number, (model, result) in enumerate(measured.items()):
        for style, (name, array) in zip(
            ("-", "--"), (("text to image", "to_image"), ("image to text", "to_text")), strict=True
        ):
            ranks = result.arrays[array]
            most = min(_CURVE, len(result.arrays["images"]))
            values = [recall_at(ranks, k) for k in range(1, most + 1)]
            label = f"{model}, {name}" if len(measured) > 1 else name
            axes.plot(range(1, most + 1), values, style, color=COLOURS[number % len(COLOURS)], label=label)
    axes.set_ylim(0, 1)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_formatter(lambda value, _: "")
    axes.set_xlabel("k")
    axes.set_ylabel("Recall@k (any caption)")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    return {"title": "Recall@k", "uri": svg(figure), "alt": f"Recall at k of {', '.join(measured)}, both directions."}


def _gap_plot(result: Result) -> Plot:
    figure, axes = blank()
    gap = modality_gap(result.arrays["images"], result.arrays["texts"][_first(result)])
    names = {
        "matching": "a picture and its text", "image-text": "a picture and another text",
        "image-image": "two pictures", "text-text": "two texts",
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
    facts = gap.metrics
    alt = (
        f"Histograms of cosine similarities: matching pairs {facts['matching_cosine']:.2f} on average, other pairs of "
        f"a picture and a text {facts['image_text_cosine']:.2f}, two texts {facts['text_text_cosine']:.2f}."
    )
    return {"title": "Similarities by kind", "uri": svg(figure), "alt": alt}


def _map(result: Result) -> Plot:
    """The two directions in which texts and pictures together differ most (principal components)."""
    figure, axes = blank()
    chosen = np.linspace(0, len(result.arrays["images"]) - 1, min(_MAPPED, len(result.arrays["images"]))).astype(int)
    images, texts = result.arrays["images"][chosen], result.arrays["texts"][_first(result)][chosen]
    both = np.concatenate([images, texts])
    both = both - both.mean(0)
    _, _, axes_of = np.linalg.svd(both, full_matrices=False)
    flat = both @ axes_of[:2].T
    left, right = flat[: len(images)], flat[len(images) :]
    for picture, text in list(zip(left, right, strict=True))[:60]:
        axes.plot(*zip(picture, text, strict=True), color="#c8ccd4", linewidth=0.6, zorder=0)
    axes.scatter(*left.T, s=9, color=COLOURS[0], label="pictures", linewidths=0)
    axes.scatter(*right.T, s=9, color=COLOURS[1], label="texts", linewidths=0)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.legend(frameon=False, fontsize=8)
    distance = np.linalg.norm(images.mean(0) - texts.mean(0))
    alt = f"Map of texts and pictures in two dimensions; their means are {distance:.2f} apart. Lines join some pairs."
    return {"title": "A map of both", "uri": svg(figure), "alt": alt}


def _heat(result: Result) -> Plot:
    figure, axes = blank()
    chosen = np.linspace(0, len(result.arrays["images"]) - 1, min(_HEATED, len(result.arrays["images"]))).astype(int)
    scores = result.arrays["texts"][_first(result)][chosen] @ result.arrays["images"][chosen].T
    shown = axes.imshow(scores, cmap="Blues")
    axes.set_xlabel("pictures")
    axes.set_ylabel("their texts")
    axes.set_xticks([])
    axes.set_yticks([])
    figure.colorbar(shown, ax=axes, fraction=0.046)
    right = float((scores.argmax(1) == np.arange(len(chosen))).mean())
    alt = (
        f"Similarities of {len(chosen)} texts and pictures; for {right:.0%} of the texts their picture is the nearest."
    )
    return {"title": "A sample", "uri": svg(figure), "alt": alt}


def _dimensions(measured: Mapping[str, Result]) -> Plot:
    figure, axes = blank()
    said = []
    for number, (model, result) in enumerate(measured.items()):
        curve = by_dimension(result.arrays["texts"], result.arrays["images"], result.arrays["owner"][:, None].tolist())
        axes.plot(
            list(curve), list(curve.values()), "o-", color=COLOURS[number % len(COLOURS)], label=model, markersize=4
        )
        said.append(f"{model} {list(curve.values())[-1]:.2f} with all {list(curve)[-1]}")
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
        "alt": f"Recall at 5 by number of dimensions: {'; '.join(said)}.",
    }


def _scatter(result: Result) -> Plot:
    figure, axes = blank()
    axes.scatter(result.arrays["human"], result.arrays["cosine"], s=7, alpha=0.35, color=COLOURS[0], linewidths=0)
    axes.set_xlabel("human score")
    axes.set_ylabel("cosine similarity")
    alt = f"Cosine similarity against human score; Spearman {result.metrics['spearman']:.3f}."
    return {"title": "Similarity and people's scores", "uri": svg(figure), "alt": alt}


def _confusion(result: Result) -> Plot:
    figure, axes = blank()
    labels, found = result.arrays["labels"], result.arrays["scores"].argmax(1)
    count = result.arrays["scores"].shape[1]
    table = np.zeros((count, count))
    np.add.at(table, (labels, found), 1)
    table /= np.maximum(table.sum(1, keepdims=True), 1)
    shown = axes.imshow(table, cmap="Blues", vmin=0, vmax=1)
    axes.set_xlabel("class found")
    axes.set_ylabel("class")
    figure.colorbar(shown, ax=axes, fraction=0.046)
    return {
        "title": "Confusions",
        "uri": svg(figure),
        "alt": f"Confusion of {count} classes; {result.metrics['accuracy']:.0%} right.",
    }


def _ranks(measured: Mapping[str, Result]) -> Plot:
    figure, axes = blank()
    for number, (model, result) in enumerate(measured.items()):
        ranks = result.arrays["ranks"]
        most = min(_CURVE, int(ranks.max()))
        values = [recall_at(ranks, k) for k in range(1, most + 1)]
        axes.plot(range(1, most + 1), values, color=COLOURS[number % len(COLOURS)], label=model)
    axes.set_ylim(0, 1)
    axes.set_xlabel("k")
    axes.set_ylabel("queries answered among the first k")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    return {
        "title": "Recall@k",
        "uri": svg(figure),
        "alt": f"Share of queries answered among the first k by {', '.join(measured)}.",
    }
