"""A self-contained HTML page about a source."""

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bifocal.files import overwrite
from bifocal.pages import COLOURS, new_figure, render, svg

PAGE = "page about data"


def write_data_page(inspection: Mapping[str, Any], path: Path) -> None:
    """Write the page. It needs no other file and no network.

    Args:
        inspection: the fields of `bifocal.data.inspection.Inspection`.

    Raises:
        NotOursError: if the path has another file, or a page that was changed since it was written.
        OSError: if the page cannot be written.
    """
    bad = sum(cause["count"] for cause in inspection["skipped"] if not cause["filtered"])
    filtered = sum(cause["count"] for cause in inspection["skipped"] if cause["filtered"])
    page = render(
        Path(__file__).parent / "templates",
        "inspection.html.j2",
        data=inspection,
        figures=_figures(inspection, bad, filtered),
        plots=_plots(inspection),
        bad=bad,
        filtered=filtered,
    )
    with overwrite(path, PAGE) as scratch:
        scratch.write_text(page, encoding="utf-8", errors="backslashreplace")


def _figures(data: Mapping[str, Any], bad: int, filtered: int) -> dict[str, str]:
    rows = data["rows"]

    counts = {"usable": data["good"], "bad": bad}
    if filtered:
        counts["filtered out"] = filtered
    counts |= {f"repeated {what}": count for what, count in data["duplicates"].items()}
    counts |= {f"near-duplicate {what}": about["count"] for what, about in data["near_duplicates"].items()}
    figures = {"rows inspected" + ("" if data["complete"] else ", of more"): f"{rows:,}"}
    for name, count in counts.items():
        share = f", {count / rows:.1%}" if rows and count else ""
        figures[name + share.replace(", 0.0%", ", under 0.1%")] = f"{count:,}"
    if data["sizes"]:
        figures["of images"] = f"{data['megabytes']:,.1f} MB"
    return figures


def _plots(data: Mapping[str, Any]) -> list[dict[str, str]]:
    plots = [_lengths(data["lengths"])] if data["lengths"] else []
    if data["sizes"]:
        plots.append(_sizes(data["sizes"]))
    if len(set(data["counts"])) > 1:
        plots.append(_counts(data["counts"], "negatives" if data["kind"] == "text-triplet" else "captions"))
    return plots


def _lengths(lengths: Mapping[str, Sequence[int]]) -> dict[str, str]:
    figure, axes = new_figure()
    longest = max(max(values) for values in lengths.values() if values)
    shortest = min(min(values) for values in lengths.values() if values)
    # Bins of equal width on the logarithmic axis: lengths of texts spread over orders of magnitude.
    edges = sorted({round(1.25**n) for n in range(60) if shortest < 1.25**n <= longest} | {shortest, longest + 1})
    for number, (column, values) in enumerate(lengths.items()):
        axes.hist(
            values, bins=edges, histtype="step", linewidth=1.6, color=COLOURS[number % len(COLOURS)], label=column
        )
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.xaxis.set_minor_formatter(lambda value, _: f"{value:,.0f}" if longest < 8 * shortest else "")
    axes.set_xlabel("characters")
    axes.set_ylabel("texts")
    axes.legend(frameon=False, fontsize=8)
    medians = "; ".join(
        f"{column}: median {statistics.median(v):,.0f}, longest {max(v):,}" for column, v in lengths.items()
    )
    return {"title": "Lengths of texts", "uri": svg(figure), "alt": f"Histogram of lengths in characters. {medians}."}


def _sizes(sizes: Sequence[tuple[int, int]]) -> dict[str, str]:
    figure, axes = new_figure()
    many = Counter(sizes)  # many images of one size are one larger point
    area = [min(400, 9 * count**0.7) for count in many.values()]
    axes.scatter([w for w, _ in many], [h for _, h in many], s=area, alpha=0.4, color=COLOURS[0], linewidths=0)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("width, pixels")
    axes.set_ylabel("height, pixels")
    sides = [min(size) for size in sizes]
    alt = f"Width and height of each image. Shorter side: median {statistics.median(sides):,.0f}, least {min(sides):,}."
    return {"title": "Sizes of images", "uri": svg(figure), "alt": alt}


def _counts(counts: Sequence[int], what: str) -> dict[str, str]:
    figure, axes = new_figure()
    numbers = range(min(counts), max(counts) + 1)
    axes.bar(numbers, [counts.count(number) for number in numbers], color=COLOURS[0])
    axes.set_xlabel(f"{what} of a row")
    axes.set_ylabel("rows")
    axes.xaxis.get_major_locator().set_params(integer=True)
    alt = f"How many {what} rows have: from {min(counts)} to {max(counts)}, {statistics.mean(counts):.1f} on average."
    return {"title": f"{what.capitalize()} of a row", "uri": svg(figure), "alt": alt}
