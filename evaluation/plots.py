"""What all plots of the reports have in common."""

import base64
import io
from typing import Any

COLOURS = ("#2f6db3", "#c2571a", "#3c8d4f", "#7a4fa3", "#8a6d1f", "#6b6b6b")


def blank() -> tuple[Any, Any]:
    """A figure and its axes."""
    from matplotlib.figure import Figure  # not pyplot: no display, no global state

    figure = Figure(figsize=(6.2, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def svg(figure: Any) -> str:
    """A figure as a data URI."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()
