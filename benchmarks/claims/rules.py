"""The rules by which a claim counts as shown, fixed before anything was run."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

R5, STS = "text retrieval R@5", "STS Spearman"
# Metrics by condition, seed and phase.
Outcomes = Mapping[str, Mapping[int, Mapping[str, Mapping[str, float]]]]


@dataclass
class Check:
    """A comparison that a claim depends on.

    Args:
        comparison: the comparison in words.
        value, bound: the check holds if value >= bound.
    """

    comparison: str
    value: float
    bound: float

    @property
    def holds(self) -> bool:
        return self.value >= self.bound


@dataclass
class Verdict:
    """The verdict on a claim, which is shown if all its checks hold."""

    checks: list[Check]

    @property
    def shown(self) -> bool:
        return all(check.holds for check in self.checks)


def values(outcomes: Outcomes, condition: str, phase: str, metric: str) -> np.ndarray:
    """Return the values of a metric in the order of the seeds."""
    return np.array([outcomes[condition][seed][phase][metric] for seed in sorted(outcomes[condition])])


def difference(outcomes: Outcomes, metric: str, better: tuple[str, str], worse: tuple[str, str]) -> tuple[float, float]:
    """Return mean and standard deviation over the seeds of (better - worse).

    Args:
        outcomes: metrics of all conditions.
        metric: name of the metric.
        better, worse: (condition, phase).
    """
    return _mean_and_deviation(values(outcomes, *better, metric) - values(outcomes, *worse, metric))


def at_least(
    outcomes: Outcomes, metric: str, better: tuple[str, str], worse: tuple[str, str], bound: float, comparison: str
) -> Check:
    """Return the check that the difference of two conditions is at least `bound`."""
    return Check(comparison, difference(outcomes, metric, better, worse)[0], bound)


def summary(outcomes: Outcomes) -> list[dict[str, Any]]:
    """Return mean and standard deviation over the seeds, in a row for each condition and phase."""
    rows = []
    for condition, seeds in outcomes.items():
        first = next(iter(seeds.values()))
        for phase, metrics in first.items():
            if not metrics:
                continue
            row: dict[str, Any] = {"condition": condition, "phase": phase, "seeds": len(seeds), "metrics": {}}
            for metric in metrics:
                row["metrics"][metric] = _mean_and_deviation(values(outcomes, condition, phase, metric))
            rows.append(row)
    return rows


def _mean_and_deviation(numbers: np.ndarray) -> tuple[float, float]:
    return float(numbers.mean()), float(numbers.std(ddof=1)) if len(numbers) > 1 else 0.0
