"""The page about the claims, with the verdict, the metrics and a plot of each."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import Any

from benchmarks.claims.claims import Claim
from benchmarks.claims.rules import Outcomes, Verdict, summary
from bifocal.files import replace_file
from bifocal.pages import COLOURS, new_figure, render, svg


@dataclass
class ClaimResult:
    """The result of a claim.

    Args:
        claim: the claim.
        outcomes: metrics of all conditions.
        verdict: whether the claim is shown.
        scale: share of the steps, 1 for the full budget.
        core_seconds: seconds of one core for a condition, mean over the seeds. Phases that conditions share
            count for the first of them.
        resumed: whether a run was killed and resumed. Then `core_seconds` are those of the last sessions.
    """

    claim: Claim
    outcomes: Outcomes
    verdict: Verdict
    scale: float
    core_seconds: Mapping[str, float]
    resumed: bool = False

    @property
    def minutes(self) -> float:
        """Minutes of two cores for all conditions and seeds."""
        return sum(seconds * len(self.outcomes[name]) for name, seconds in self.core_seconds.items()) / 60 / 2

    @property
    def rows(self) -> list[dict[str, Any]]:
        return summary(self.outcomes)

    @property
    def metrics(self) -> list[str]:
        return list(dict.fromkeys(metric for row in self.rows for metric in row["metrics"]))

    @property
    def plot(self) -> str:
        return svg(_bars(self.rows, self.metrics))


def write_claims_page(results: Sequence[ClaimResult], described: str, versions: Mapping[str, str], path: Path) -> None:
    """Write the page.

    Args:
        results: results of the claims.
        described: sentences about the data.
        versions: versions of the libraries.
        path: file of the page.
    """
    page = render(
        Path(__file__).parent / "templates", "claims.html.j2", results=results, described=described, versions=versions
    )
    with replace_file(path) as scratch:
        scratch.write_text(page, encoding="utf-8")


def _bars(rows: Sequence[Mapping[str, Any]], metrics: Sequence[str]) -> Any:
    """Return a group of bars per metric with a bar per condition and phase, and the deviation over the seeds."""
    figure, axes = new_figure()
    width = 0.8 / len(rows)
    for number, row in enumerate(rows):
        positions = [group + number * width - 0.4 + width / 2 for group, m in enumerate(metrics) if m in row["metrics"]]
        means = [row["metrics"][m][0] for m in metrics if m in row["metrics"]]
        spreads = [row["metrics"][m][1] for m in metrics if m in row["metrics"]]
        phases = sum(other["condition"] == row["condition"] for other in rows)
        label = row["condition"] if phases == 1 else f"{row['condition']}: {row['phase']}"
        axes.bar(positions, means, width * 0.92, yerr=spreads, label=label, color=COLOURS[number % len(COLOURS)],
                 hatch="" if number < len(COLOURS) else "//", error_kw={"linewidth": 1})  # fmt: skip
    axes.set_xticks(range(len(metrics)), [fill(metric, 72 // len(metrics)) for metric in metrics], fontsize=8)
    axes.axhline(0, color="black", linewidth=0.8)  # correlations may be negative
    handles, labels = axes.get_legend_handles_labels()
    columns = 2 if max(map(len, labels)) <= 40 else 1  # longer labels would be cut off at the edges
    figure.legend(handles, labels, frameon=False, fontsize=8, loc="outside lower center", ncols=columns)
    return figure
