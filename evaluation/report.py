"""One self-contained HTML page about what models reach: side by side, and each data set in pictures."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from bifocal.data.skips import summary as fault_summary
from bifocal.evaluation.compression import by_dimension, by_precision
from bifocal.evaluation.protocols import Result
from bifocal.evaluation.report_plots import (
    confusion_plot,
    dimensions_plot,
    gap_of,
    gap_plot,
    heat_plot,
    images_of,
    map_plot,
    ranks_plot,
    recall_plot,
    scatter_plot,
)
from bifocal.files import overwrite
from bifocal.pages import render

EVALUATION = "evaluation"  # kind of the page and of the numbers beside it
_NAMED = 20  # skipped rows that are listed
_UNSHOWN = ("dimensions", "shared rows")  # told elsewhere


def write_evaluation_page(results: Mapping[str, Sequence[Result]], path: Path, title: str) -> None:
    """Render the page. It needs no other file and asks for nothing over the network.

    Args:
        results: of each model, the same tasks in the same order.

    Raises:
        NotOursError: if a file is there that is no such page, or that was changed since it was written.
        OSError: if the page cannot be written.
    """
    results = dict(zip(_labels(list(results)), results.values(), strict=True))
    page = render(
        Path(__file__).parent / "templates",
        "report.html.j2",
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
                "skipped": result.skipped,
                "seconds": result.seconds, "parameters": result.parameters, "speed": result.speed,
            }  # fmt: skip
            if "owner" in result.arrays:
                entry |= _extras(result)
            found[model][result.task] = entry
    return found


def _extras(result: Result) -> dict[str, Any]:
    """What is computed of the embeddings of an image-text task: modality gap, quality by dimension and precision."""
    images, texts = result.arrays["images"], result.arrays["texts"]
    gap = gap_of(result)
    return {
        "gap": {} if gap is None else gap.metrics,
        "recall_by_dimension": by_dimension(texts, images, images_of(result)),
        "recall_by_precision": by_precision(texts, images, images_of(result)),
    }


def remarks(result: Result) -> list[str]:
    """Return sentences about a data set's rows: those that share a text or an image, and those that were skipped."""
    said = []
    shared, skipped = result.sizes.get("shared rows", 0), len(result.skips)
    if shared:
        one = shared == 1
        said.append(
            f"{shared:,} row{' shares' if one else 's share'} a text or an image with another row; such rows are right "
            "answers of each other"
        )
    if skipped:
        causes = fault_summary(Counter(result.skipped))
        said.append(f"{skipped:,} row{' was' if skipped == 1 else 's were'} skipped ({causes})")
    return said


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
        facts = ", ".join(f"{count:,} {what}" for what, count in one.sizes.items() if count and what not in _UNSHOWN)
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
            "notes": [],
        }
    first = next(iter(measured.values()))
    names = list(dict.fromkeys(name for result in measured.values() for name in result.metrics))
    metrics = [(_spelt(n), [f"{r.metrics[n]:.4f}" if n in r.metrics else "" for r in measured.values()]) for n in names]
    section: dict[str, Any] = {
        "task": first.task, "kind": first.kind, "models": list(measured), "metrics": metrics, "plots": [],
        "notes": remarks(first), "skips": first.skips[:_NAMED],
    }  # fmt: skip
    if "owner" in first.arrays:
        gap = gap_of(first)
        section["plots"] = [recall_plot(measured), heat_plot(first), dimensions_plot(measured)]
        if gap is not None:
            section["plots"][1:1] = [gap_plot(gap), map_plot(first)]
        section["gaps"] = _gap_rows(measured)
        section["precisions"] = _precision_rows(measured)
        section["failures"] = [(model, result.examples) for model, result in measured.items()]
    elif "human" in first.arrays:
        section["plots"] = [scatter_plot(first)]
    elif "scores" in first.arrays:
        section["plots"] = [confusion_plot(first)]
    elif "ranks" in first.arrays:
        section["plots"] = [ranks_plot(measured)]
    return section


def _gap_rows(measured: Mapping[str, Result]) -> list[tuple[str, list[str]]]:
    gaps = [gap.metrics for gap in map(gap_of, measured.values()) if gap is not None]
    return [(_spelt(name), [f"{gap[name]:.3f}" for gap in gaps]) for name in gaps[0]] if gaps else []


def _precision_rows(measured: Mapping[str, Result]) -> list[tuple[str, list[str]]]:
    found = [by_precision(r.arrays["texts"], r.arrays["images"], images_of(r)) for r in measured.values()]
    names = list(dict.fromkeys(name for one in found for name in one))
    return [
        (name, [f"{one[name]['recall']:.3f} ({one[name]['bytes']:,.0f} bytes)" if name in one else "" for one in found])
        for name in names
    ]
