"""The rules by which a claim counts as shown, fixed before anything was run."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

# Metric by phase, by seed, by arm.
Outcomes = Mapping[str, Mapping[int, Mapping[str, Mapping[str, float]]]]


@dataclass
class Check:
    """One comparison of a claim.

    Args:
        said: the comparison in words.
        value, bound: it holds where value >= bound.
    """

    said: str
    value: float
    bound: float

    @property
    def holds(self) -> bool:
        return self.value >= self.bound


@dataclass
class Verdict:
    """A claim is shown if all its checks hold."""

    checks: list[Check]

    @property
    def shown(self) -> bool:
        return all(check.holds for check in self.checks)


def values(outcomes: Outcomes, arm: str, phase: str, metric: str) -> np.ndarray:
    """One value for each seed, seeds in order."""
    return np.array([outcomes[arm][seed][phase][metric] for seed in sorted(outcomes[arm])])


def difference(outcomes: Outcomes, metric: str, better: tuple[str, str], worse: tuple[str, str]) -> tuple[float, float]:
    """Mean over the seeds of (better - worse), each seed with itself, and the deviation of that difference.

    Args:
        better, worse: (arm, phase).
    """
    found = values(outcomes, *better, metric) - values(outcomes, *worse, metric)
    return float(found.mean()), float(found.std(ddof=1)) if len(found) > 1 else 0.0


def at_least(
    outcomes: Outcomes, metric: str, better: tuple[str, str], worse: tuple[str, str], bound: float, said: str
) -> Check:
    return Check(said, difference(outcomes, metric, better, worse)[0], bound)


def summary(outcomes: Outcomes) -> list[dict[str, Any]]:
    """Mean and standard deviation over the seeds, a row for each arm and phase."""
    rows = []
    for arm, seeds in outcomes.items():
        first = next(iter(seeds.values()))
        for phase, metrics in first.items():
            if not metrics:
                continue
            row: dict[str, Any] = {"arm": arm, "phase": phase, "seeds": len(seeds), "metrics": {}}
            for metric in metrics:
                found = values(outcomes, arm, phase, metric)
                row["metrics"][metric] = (float(found.mean()), float(found.std(ddof=1)) if len(found) > 1 else 0.0)
            rows.append(row)
    return rows
