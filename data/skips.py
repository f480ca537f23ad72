"""Rows that are left out: why, how many, named in a log, and when they are too many to go on."""

import json
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from bifocal.errors import DataError
from bifocal.files import NotOursError

# Below so many rows a share says little; small sources are judged when they end.
FIRST = 1000
FAULT = "_fault"  # a column with a `Skip` in JSON for rows that are left out


class Fault(Exception):  # noqa: N818  # not an error of the program, but a row's
    """Why a row is left out.

    Args:
        cause: in a few words, the same for all rows with this fault: they are counted by it.
        detail: what is particular about this row.
        dropped: asked for by a filter, and not counted as bad.
        shard: the rest of the file is lost with it.
    """

    def __init__(self, cause: str, detail: str = "", dropped: bool = False, shard: bool = False) -> None:
        super().__init__(cause, detail, dropped, shard)
        self.cause, self.detail, self.dropped, self.shard = cause, detail, dropped, shard

    def __str__(self) -> str:
        return f"{self.cause}: {self.detail}" if self.detail else self.cause


class Skip(NamedTuple):
    """A row that was left out. Its fields are those of `Fault`, with the name of the row."""

    row: str
    cause: str
    detail: str = ""
    dropped: bool = False
    shard: bool = False

    @classmethod
    def of(cls, row: str, fault: Fault) -> "Skip":
        return cls(row, fault.cause, fault.detail, fault.dropped, fault.shard)


def start_log(path: Path) -> Path:
    """Return the place of a log that begins now; one that an earlier run wrote there is removed.

    Raises:
        NotOursError: if the file there is no such log.
    """
    require_log(path)
    path.unlink(missing_ok=True)
    return path


def require_log(path: Path) -> None:
    """
    Raises:
        NotOursError: if there is a file that is no log of skipped rows.
    """
    if path.exists():
        try:
            with path.open(encoding="utf-8") as file:
                first = file.readline()
            ours = not first or {"task", "row", "cause", "detail", "dropped"} == set(json.loads(first))
        except (OSError, ValueError, TypeError):
            ours = False
        if not ours:
            raise NotOursError(f"'{path}' is no log of skipped rows, and one would be written there; move it away.")


class BadRowsError(DataError):
    """More rows are bad than the source may have."""


class Skipped:
    """Counts by task what was left out, and names it in a log, one JSON line a row.

    A file that is missing or breaks off counts as so many bad rows as the other files have on average, less those that
    were read of it.

    Args:
        log: file to append to; None keeps counts only.
    """

    def __init__(self, log: Path | None = None) -> None:
        self.log = log
        self.rows: Counter[str] = Counter()
        self.bad: dict[str, Counter[str]] = {}
        self.dropped: dict[str, Counter[str]] = {}
        self.shards: Counter[str] = Counter()
        self.lost: Counter[str] = Counter()
        self.first: dict[tuple[str, str], Skip] = {}  # by task and cause

    def add(self, task: str, rows: int, skips: Iterable[Skip] = (), shards: int = 0) -> None:
        """
        Args:
            task: name of the task or source.
            rows: how many rows were looked at, bad ones included.
            shards: how many files were read to their end.

        Raises:
            OSError: the log cannot be written.
        """
        self.rows[task] += rows
        self.shards[task] += shards
        lines = []
        for skip in skips:
            counts = (self.dropped if skip.dropped else self.bad).setdefault(task, Counter())
            counts[skip.cause] += 1
            self.first.setdefault((task, skip.cause), skip)
            self.lost[task] += skip.shard
            entry = {"task": task, "row": skip.row, "cause": skip.cause, "detail": skip.detail}
            lines.append(json.dumps({**entry, "dropped": skip.dropped}, ensure_ascii=False) + "\n")
        if lines and self.log is not None:
            self.log.parent.mkdir(parents=True, exist_ok=True)
            with self.log.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.writelines(lines)

    def share(self, task: str) -> float:
        """The share of a task's rows that are bad, lost files estimated."""
        lost, shards = self.lost[task], self.shards[task]
        read, bad = self.rows[task] - lost, self.bad.get(task, Counter()).total() - lost
        if lost:
            # As many rows as a whole file has on average; one, if none was read to its end.
            missing = max(float(lost), (shards + lost) * read / shards - read if shards else 0.0)
            read, bad = read + int(missing), bad + int(missing)
        return bad / read if read else 0.0

    def check(self, task: str, most: float, ended: bool = False) -> None:
        """
        Args:
            most: the share of bad rows that may be.
            ended: the source was read to its end, so that a share means something however few rows it has.

        Raises:
            BadRowsError: there are more, with the causes and the log.
        """
        share = self.share(task)
        if share <= most or not (ended or self.rows[task] >= FIRST or (self.lost[task] and self.shards[task])):
            return
        where = f"; they are named in {self.log}" if self.log is not None else ""
        raise BadRowsError(
            f"'{task}': {share:.1%} of {self.rows[task]:,} rows are bad, more than max_bad={most:g} allows"
            f" ({summary(self.bad[task])}){where}{self.example(task)}. Mend or remove them, or raise max_bad."
        )

    def example(self, task: str) -> str:
        """Return ", such as ROW: DETAIL" for one row with the most frequent cause; empty if none is known."""
        causes = self.bad.get(task, Counter()).most_common(1)
        first = self.first.get((task, causes[0][0])) if causes else None  # not known after resuming
        return f", such as {first.row}: {first.detail[:300]}" if first is not None and first.detail else ""

    def state(self) -> dict[str, Any]:
        """Counts, and how long the log is, in plain types."""
        size = self.log.stat().st_size if self.log is not None and self.log.exists() else 0
        return {
            "rows": dict(self.rows), "shards": dict(self.shards), "lost": dict(self.lost), "log": size,
            "bad": {task: dict(counts) for task, counts in self.bad.items()},
            "dropped": {task: dict(counts) for task, counts in self.dropped.items()},
        }  # fmt: skip

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from a state; what the log held beyond it is cut off, since it will come again."""
        self.rows, self.shards, self.lost = (Counter(state[name]) for name in ("rows", "shards", "lost"))
        self.bad = {task: Counter(counts) for task, counts in state["bad"].items()}
        self.dropped = {task: Counter(counts) for task, counts in state["dropped"].items()}
        if self.log is not None and self.log.exists() and self.log.stat().st_size > state["log"]:
            os.truncate(self.log, state["log"])


def summary(counts: Counter[str], most: int = 6) -> str:
    """ "20 broken picture, 11 no caption" """
    shown = ", ".join(f"{count:,} {cause}" for cause, count in counts.most_common(most))
    return shown + (f" and {len(counts) - most} other causes" if len(counts) > most else "")
