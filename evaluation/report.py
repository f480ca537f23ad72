"""The evaluation report: one self-contained HTML page that compares models, with plots of each data set."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from bifocal.data.evaluation_protocols import find_protocol
from bifocal.data.skips import summary as skip_summary
from bifocal.evaluation.arguments import EVALUATION
from bifocal.evaluation.compression import by_dimension, by_precision
from bifocal.evaluation.protocols import Result
from bifocal.evaluation.report_plots import (
    confusion_plot,
    dimensions_plot,
    gap_of,
    gap_plot,
    map_plot,
    ranks_plot,
    recall_plot,
    right_images,
    scatter_plot,
    similarity_plot,
)
from bifocal.files import overwrite
from bifocal.pages import render

_SHOWN_SKIPS = 20  # skipped rows that the page lists
_NOT_IN_TABLE = ("dimensions", "shared rows")  # sizes that the page shows elsewhere


def write_evaluation_page(results: Mapping[str, Sequence[Result]], path: Path, title: str) -> None:
    """Write the page. It needs no other file and requests nothing over the network.

    Args:
        results: results of each model, the same tasks in the same order.
        path: file of the page.
        title: title of the page.

    Raises:
        NotOursError: if the file exists and Bifocal did not write it, or it was changed since.
        OSError: if the page cannot be written.
    """
    results = dict(zip(_short_names(list(results)), results.values(), strict=True))
    page = render(
        Path(__file__).parent / "templates",
        "report.html.j2",
        title=title,
        models=list(results),
        headline=_headline(results),
        comparison=_comparison(results),
        sections=[_section(results, number) for number in range(len(next(iter(results.values()))))],
        speed=_speed(results),
        published=yaml.safe_load((Path(__file__).parent / "published.yaml").read_text(encoding="utf-8")),
    )
    with overwrite(path, EVALUATION) as scratch:
        scratch.write_text(page, encoding="utf-8", errors="backslashreplace")


def results_as_numbers(results: Mapping[str, Sequence[Result]]) -> dict[str, Any]:
    """Return the contents of `results.json`: metrics, sizes, speed, modality gap and compression by model and task."""
    numbers: dict[str, Any] = {}
    for model, of_model in results.items():
        numbers[model] = {}
        for result in of_model:
            if not result.metrics:
                continue
            entry: dict[str, Any] = {
                "kind": result.kind, "main": result.main, "metrics": result.metrics, "sizes": result.sizes,
                "skipped": result.skipped, "prompts": result.prompts, "dtype": result.dtype,
                "fast_decoding": result.fast_decoding,
                "seconds": result.seconds, "parameters": result.parameters, "speed": result.speed,
            }  # fmt: skip
            if "owner" in result.arrays:
                entry |= _image_text_numbers(result)
            numbers[model][result.task] = entry
    return numbers


def _image_text_numbers(result: Result) -> dict[str, Any]:
    """Return what the embeddings of image-text retrieval show: modality gap, recall by dimension and by precision."""
    images, texts = result.arrays["images"], result.arrays["texts"]
    gap = gap_of(result)
    return {
        "gap": {} if gap is None else gap.metrics,
        "recall_by_dimension": by_dimension(texts, images, right_images(result)),
        "recall_by_precision": by_precision(texts, images, right_images(result)),
    }


def summary_lines(results: Mapping[str, Sequence[Result]]) -> list[str]:
    """Return a line for each task: the main metric of every model, and remarks on the rows."""
    lines = []
    for of_task in zip(*results.values(), strict=True):
        measured = [(model, result) for model, result in zip(results, of_task, strict=True) if result.metrics]
        values = "  ".join(f"{model} {result.metrics[result.main]:.3f}" for model, result in measured)
        notes = row_remarks(measured[0][1]) if measured else []
        line = f"{of_task[0].task} ({of_task[0].main}): {values}"
        lines.append(f"{line}  ({'; '.join(notes)})" if notes else line)
    return lines


def row_remarks(result: Result) -> list[str]:
    """Return sentences about the rows that share a text or an image and the rows that were skipped."""
    remarks = []
    shared, skipped = result.sizes.get("shared rows", 0), len(result.skips)
    if shared:
        remarks.append(
            f"{shared:,} row{' shares' if shared == 1 else 's share'} a text or an image with another row; such rows "
            "are right answers of each other"
        )
    if skipped:
        causes = skip_summary(Counter(result.skipped))
        remarks.append(f"{skipped:,} row{' was' if skipped == 1 else 's were'} skipped ({causes})")
    return remarks


def _short_names(paths: list[str]) -> list[str]:
    """Return the last two parts of each model's path, or the whole paths if these are not unique."""
    short = ["/".join(Path(path).parts[-2:]) for path in paths]
    return short if len(set(short)) == len(short) else paths


def _headline(results: Mapping[str, Sequence[Result]]) -> dict[str, str]:
    first = next(iter(results.values()))
    return {f"{r.task}: {_metric_title(r.main)}": f"{r.metrics[r.main]:.3f}" for r in first if r.metrics}


def _metric_title(metric: str) -> str:
    return metric.replace("_", " ").replace("/", ", ")


def _comparison(results: Mapping[str, Sequence[Result]]) -> list[dict[str, Any]]:
    """Return the rows of the table that compares the models by their main metrics."""
    rows = []
    for of_task in zip(*results.values(), strict=True):
        values = [result.metrics[result.main] if result.metrics else None for result in of_task]
        best = max((value for value in values if value is not None), default=None)
        cells = [("" if value is None else f"{value:.3f}", len(values) > 1 and value == best) for value in values]
        first = next((result for result in of_task if result.metrics), of_task[0])
        sizes = (f"{count:,} {what}" for what, count in first.sizes.items() if count and what not in _NOT_IN_TABLE)
        rows.append(
            {"task": first.task, "metric": _metric_title(first.main), "cells": cells, "sizes": ", ".join(sizes)}
        )
    return rows


def _speed(results: Mapping[str, Sequence[Result]]) -> list[dict[str, Any]]:
    rows = []
    for model, of_model in results.items():
        dimensions = next((result.sizes["dimensions"] for result in of_model if "dimensions" in result.sizes), None)
        rates: dict[str, list[float]] = {}
        for result in of_model:
            for name, rate in result.speed.items():
                rates.setdefault(name, []).append(rate)
        rows.append({
            "model": model, "parameters": f"{max(result.parameters for result in of_model) / 1e6:,.1f} M",
            "dtype": ", ".join(dict.fromkeys(_precision(result) for result in of_model if result.dtype)),
            "dimensions": dimensions, "bytes": None if dimensions is None else 4 * dimensions,
            "texts": _highest(rates.get("texts_per_second")), "images": _highest(rates.get("images_per_second")),
            "seconds": f"{sum(result.seconds for result in of_model):,.0f}",
        })  # fmt: skip
    return rows


def _precision(result: Result) -> str:
    """Return what a result was computed in, for the table."""
    return f"{result.dtype}, fast decoding" if result.fast_decoding else result.dtype


def _highest(rates: list[float] | None) -> str | None:
    return None if not rates else f"{max(rates):,.0f}"


def _section(results: Mapping[str, Sequence[Result]], number: int) -> dict[str, Any]:
    """Return the section of a task."""
    of_task = {model: of_model[number] for model, of_model in results.items()}
    measured = {model: result for model, result in of_task.items() if result.metrics}
    section: dict[str, Any] = dict.fromkeys(
        ("models", "metrics", "plots", "notes", "skips", "gaps", "precisions", "failures"), ()
    )
    first = next(iter((measured or of_task).values()))
    section |= {"task": first.task, "kind": find_protocol(first.kind).title}
    if not measured:
        return section | {"notes": ["Not measured, since none of these models embeds images"]}
    names = list(dict.fromkeys(name for result in measured.values() for name in result.metrics))
    section |= {
        "models": list(measured), "notes": [*row_remarks(first), *_prompt_remarks(measured)],
        "skips": first.skips[:_SHOWN_SKIPS],
        "metrics": [
            (_metric_title(name), [f"{r.metrics[name]:.4f}" if name in r.metrics else "" for r in measured.values()])
            for name in names
        ],
    }  # fmt: skip
    if "owner" in first.arrays:
        gap = gap_of(first)
        section["plots"] = [recall_plot(measured), similarity_plot(first), dimensions_plot(measured)]
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


def _prompt_remarks(measured: Mapping[str, Result]) -> list[str]:
    """Return a sentence about the prompts of each model that has some for queries and documents."""
    remarks = []
    for model, result in measured.items():
        if result.prompts:
            prompts = " and ".join(f"each {name} with the prompt '{text}'" for name, text in result.prompts.items())
            remarks.append(f"'{model}' embeds {prompts}")
    return remarks


def _gap_rows(measured: Mapping[str, Result]) -> list[tuple[str, list[str]]]:
    gaps = [gap.metrics for gap in map(gap_of, measured.values()) if gap is not None]
    return [(_metric_title(name), [f"{gap[name]:.3f}" for gap in gaps]) for name in gaps[0]] if gaps else []


def _precision_rows(measured: Mapping[str, Result]) -> list[tuple[str, list[str]]]:
    curves = [by_precision(r.arrays["texts"], r.arrays["images"], right_images(r)) for r in measured.values()]
    names = list(dict.fromkeys(name for curve in curves for name in curve))
    return [
        (name, [f"{c[name]['recall']:.3f} ({c[name]['bytes']:,.0f} bytes)" if name in c else "" for c in curves])
        for name in names
    ]
