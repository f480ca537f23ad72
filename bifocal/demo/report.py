"""One self-contained HTML page about a training run: stages, curves, and searches with their results."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from bifocal.files import RUN, overwrite
from bifocal.pages import COLOURS, new_figure, render, svg


@dataclass
class Item:
    """A text, an image, or an image with a text under it, as it appears in a search.

    Args:
        alt: alternative text, read to those who cannot see the image.
    """

    text: str | None = None
    image: Image.Image | None = None
    alt: str = ""

    @property
    def label(self) -> str:
        """The item in one line of text."""
        return " ".join(part for part in (self.alt, self.text) if part)

    @property
    def image_uri(self) -> str | None:
        if self.image is None:
            return None
        buffer = io.BytesIO()
        self.image.save(buffer, "PNG")
        return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


@dataclass
class Hit:
    """One result: the item, its cosine similarity, and whether it is the right answer."""

    item: Item
    score: float
    right: bool


@dataclass
class Search:
    """A query, its first results, and the right answer with its rank (from 1)."""

    query: Item
    hits: list[Hit]
    answer: Item
    rank: int


@dataclass
class Stage:
    """What a stage did and reached.

    Args:
        name: heading of its row.
        steps, seconds: optimiser steps and the time they took, without evaluation.
        metrics: by column of the table.
        losses: for each task the points (step, mean loss since the point before).
        recall: for each direction Recall@1, Recall@2, ...
    """

    name: str
    steps: int
    seconds: float
    metrics: dict[str, float]
    losses: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    recall: dict[str, list[float]] = field(default_factory=dict)


@dataclass
class Gallery:
    """A heading, a sentence and searches."""

    title: str
    note: str
    searches: list[Search]


@dataclass
class Report:
    title: str
    summary: str
    figures: dict[str, str]  # headline number by what it is
    stages: list[Stage]
    galleries: list[Gallery]
    settings: dict[str, Any]


def write_report(report: Report, path: Path) -> None:
    """Render the page. It needs no other file and asks for nothing over the network.

    Raises:
        NotOursError: if the file exists and is not such a page, or was changed since it was written.
    """
    page = render(
        Path(__file__).parent / "templates",
        "report.html.j2",
        report=report,
        columns=list(report.stages[0].metrics),
        plots=_plots(report.stages),
    )
    with overwrite(path, RUN) as scratch:
        scratch.write_text(page, encoding="utf-8")


def _plots(stages: Sequence[Stage]) -> list[dict[str, str]]:
    return [_loss_plot(stages), _recall_plot(stages)]


def _loss_plot(stages: Sequence[Stage]) -> dict[str, str]:
    figure, axes = new_figure()
    tasks = list(dict.fromkeys(task for stage in stages for task in stage.losses))
    start = 0
    for stage in stages:
        for task, points in stage.losses.items():
            colour = COLOURS[tasks.index(task) % len(COLOURS)]
            label = task if all(task not in s.losses for s in stages[: stages.index(stage)]) else None
            axes.plot([start + step for step, _ in points], [loss for _, loss in points], color=colour, label=label)
        axes.text(start + stage.steps / 2, 1.01, stage.name.partition(":")[0], ha="center", va="bottom", fontsize=8,
                  color="#777777", transform=axes.get_xaxis_transform())  # fmt: skip
        start += stage.steps
        axes.axvline(start, color="#bbbbbb", linewidth=0.8, linestyle=":")
    axes.set_yscale("log")
    axes.set_xlabel("step (the stage above)")
    axes.set_ylabel("loss")
    axes.legend(frameon=False, fontsize=8)
    last = "; ".join(f"{task} ends at {points[-1][1]:.2f}" for task, points in stages[-1].losses.items() if points)
    return {"title": "Losses", "uri": svg(figure), "alt": f"Loss of each task over the steps of all stages. {last}."}


def _recall_plot(stages: Sequence[Stage]) -> dict[str, str]:
    figure, axes = new_figure()
    styles = ("-", "--", ":")
    for number, stage in enumerate(stages):
        for direction, (name, values) in enumerate(stage.recall.items()):
            axes.plot(
                range(1, len(values) + 1), values, styles[direction % len(styles)],
                color=COLOURS[number % len(COLOURS)], label=f"{stage.name}, {name}",
            )  # fmt: skip
    axes.set_ylim(0, 1)
    axes.set_xscale("log")
    ticks = [1, 2, 5, 10, 20, 50]
    axes.set_xticks(ticks, labels=map(str, ticks), minor=False)
    axes.minorticks_off()
    axes.set_xlabel("k")
    axes.set_ylabel("Recall@k")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    last = "; ".join(f"{name} {values[4]:.2f} at 5" for name, values in stages[-1].recall.items() if len(values) > 4)
    return {
        "title": "Recall@k after each stage",
        "uri": svg(figure),
        "alt": f"Recall at k after each stage. Last stage: {last}.",
    }
