"""HTML pages and plots: what all reports share."""

import base64
import io
from pathlib import Path
from typing import Any

COLOURS = ("#2f6db3", "#c2571a", "#3c8d4f", "#7a4fa3", "#8a6d1f", "#6b6b6b")


def render(templates: Path, name: str, **values: Any) -> str:
    """Return an HTML page that needs no other file and requests nothing over the network.

    Args:
        templates: folder of the template. It may include `style.css.j2`, which is in the folder next to this module.
        name: file name of the template.
        values: variables of the template. A missing one is an error.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    folders = [str(templates), str(Path(__file__).parent / "templates")]
    environment = Environment(
        loader=FileSystemLoader(folders), autoescape=True, trim_blocks=True, undefined=StrictUndefined
    )
    return environment.get_template(name).render(**values)


def new_figure() -> tuple[Any, Any]:
    """Return an empty figure and its axes."""
    from matplotlib.figure import Figure  # not pyplot, which needs a display and has global state

    figure = Figure(figsize=(6.2, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def svg(figure: Any) -> str:
    """Return a figure as a data URI of an SVG image."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()
