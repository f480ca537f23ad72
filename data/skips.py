"""Skipped rows: reasons, counts, log file, and the limit at which a run stops."""

import json
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from bifocal.errors import DataError
from bifocal.files import NotOursError

# Rows read before a fraction of bad rows is judged; smaller sources are judged at their end.
FIRST = 1000
ERROR_COLUMN = "_row_error"  # a column that holds a `SkippedRow` as JSON for each bad row


class RowError(Exception):  # a row's error, not the program's
    """Why a row is skipped.

    Args:
        cause: a few words that all rows with this problem share; rows are counted by it.
        detail: what is wrong with this row.
        filtered: whether a filter removed the row, so that it does not count as bad.
        file_lost: whether the rest of the file is lost, too.
    """

    def __init__(self, cause: str, detail: str = "", filtered: bool = False, file_lost: bool = False) -> None:
        super().__init__(cause, detail, filtered, file_lost)
        self.cause, self.detail, self.filtered, self.file_lost = cause, detail, filtered, file_lost

    def __str__(self) -> str:
        return f"{self.cause}: {self.detail}" if self.detail else self.cause


class SkippedRow(NamedTuple):
    """A skipped row: its name, and the fields of its `RowError`."""

    row: str
    cause: str
    detail: str = ""
    filtered: bool = False
    file_lost: bool = False

    @classmethod
    def of(cls, row: str, row_error: RowError) -> "SkippedRow":
        return cls(row, row_error.cause, row_error.detail, row_error.filtered, row_error.file_lost)


def start_log(path: Path) -> Path:
    """Remove the log of an earlier run and return the path for a new one.

    Raises:
        NotOursError: if the file is not such a log.
    """
    require_log(path)
    path.unlink(missing_ok=True)
    return path


def require_log(path: Path) -> None:
    """Require that a path is free or holds a log of skipped rows.

    Raises:
        NotOursError: if it holds another file.
    """
    if path.exists():
        try:
            with path.open(encoding="utf-8") as file:
                first = file.readline()
            ours = not first or {"task", "row", "cause", "detail", "filtered"} == set(json.loads(first))
        except (OSError, ValueError, TypeError):
            ours = False
        if not ours:
            raise NotOursError(f"'{path}' is not a log of skipped rows, which would be written there. Move it away.")


class BadRowsError(DataError):
    """More rows are bad than a source's `max_bad_fraction` allows."""


class SkipLog:
    """Counts skipped rows by task, and lists them in a log, one JSON line per row.

    A file that is missing or breaks off counts as many bad rows as the other files have on average, less the rows that
    were read from it.

    Args:
        log: file to append to; None keeps counts only.
    """

    def __init__(self, log: Path | None = None) -> None:
        self.log = log
        self.rows: Counter[str] = Counter()
        self.bad: dict[str, Counter[str]] = {}
        self.filtered: dict[str, Counter[str]] = {}
        self.shards: Counter[str] = Counter()
        self.lost: Counter[str] = Counter()
        self.first: dict[tuple[str, str], SkippedRow] = {}  # by task and cause

    def add(self, task: str, rows: int, skips: Iterable[SkippedRow] = (), shards: int = 0) -> None:
        """Add rows to the counts, and skipped ones to the log.

        Args:
            task: name of the task or source.
            rows: number of rows read, bad ones included.
            shards: number of files read to their end.

        Raises:
            OSError: if the log cannot be written.
        """
        self.rows[task] += rows
        self.shards[task] += shards
        lines = []
        for skip in skips:
            counts = (self.filtered if skip.filtered else self.bad).setdefault(task, Counter())
            counts[skip.cause] += 1
            self.first.setdefault((task, skip.cause), skip)
            self.lost[task] += skip.file_lost
            entry = {"task": task, "row": skip.row, "cause": skip.cause, "detail": skip.detail}
            lines.append(json.dumps({**entry, "filtered": skip.filtered}, ensure_ascii=False) + "\n")
        if lines and self.log is not None:
            self.log.parent.mkdir(parents=True, exist_ok=True)
            with self.log.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.writelines(lines)

    def share(self, task: str) -> float:
        """Return the fraction of a task's rows that are bad, lost files estimated."""
        lost, shards = self.lost[task], self.shards[task]
        read, bad = self.rows[task] - lost, self.bad.get(task, Counter()).total() - lost
        if lost:
            # As many rows as a whole file has on average; one, if none was read to its end.
            missing = max(float(lost), (shards + lost) * read / shards - read if shards else 0.0)
            read, bad = read + int(missing), bad + int(missing)
        return bad / read if read else 0.0

    def check(self, task: str, most: float, ended: bool = False) -> None:
        """Stop if too many rows are bad.

        Args:
            most: largest fraction of bad rows that is allowed.
            ended: whether the source was read to its end; before that, a few rows are not judged.

        Raises:
            BadRowsError: if more rows are bad; it names the causes and the log.
        """
        share = self.share(task)
        if share <= most or not (ended or self.rows[task] >= FIRST or (self.lost[task] and self.shards[task])):
            return
        where = f"; they are named in {self.log}" if self.log is not None else ""
        raise BadRowsError(
            f"'{task}': {share:.1%} of {self.rows[task]:,} rows are bad, more than max_bad_fraction={most:g} allows"
            f" ({summary(self.bad[task])}){where}{self.example(task)}. Correct or remove them, or raise "
            "max_bad_fraction."
        )

    def example(self, task: str) -> str:
        """Return ", such as ROW: DETAIL" for one row with the most frequent cause; empty if none is known."""
        causes = self.bad.get(task, Counter()).most_common(1)
        first = self.first.get((task, causes[0][0])) if causes else None  # not known after resuming
        return f", such as {first.row}: {first.detail[:300]}" if first is not None and first.detail else ""

    def no_rows(self, source: str, task: str) -> DataError:
        """Return the error for a source of which every row is skipped, with the causes."""
        counts = self.bad.get(task, Counter()) + self.filtered.get(task, Counter())
        causes = f" ({summary(counts)})" if counts else ""
        return DataError(f"'{source}' has no usable row{causes}{self.example(task)}. Correct its rows or its filters.")

    def state(self) -> dict[str, Any]:
        """Return the counts and the length of the log, in plain types."""
        size = self.log.stat().st_size if self.log is not None and self.log.exists() else 0
        return {
            "rows": dict(self.rows), "shards": dict(self.shards), "lost": dict(self.lost), "log": size,
            "bad": {task: dict(counts) for task, counts in self.bad.items()},
            "filtered": {task: dict(counts) for task, counts in self.filtered.items()},
        }  # fmt: skip

    def load_state(self, state: dict[str, Any]) -> None:
        """Resume from a state; later lines of the log are cut off, since these rows will be read again."""
        self.rows, self.shards, self.lost = (Counter(state[name]) for name in ("rows", "shards", "lost"))
        self.bad = {task: Counter(counts) for task, counts in state["bad"].items()}
        self.filtered = {task: Counter(counts) for task, counts in state["filtered"].items()}
        if self.log is not None and self.log.exists() and self.log.stat().st_size > state["log"]:
            os.truncate(self.log, state["log"])


def summary(counts: Counter[str], most: int = 6) -> str:
    """Return counts as text, such as "20 broken image, 11 no caption"."""
    shown = ", ".join(f"{count:,} {cause}" for cause, count in counts.most_common(most))
    return shown + (f" and {len(counts) - most} other causes" if len(counts) > most else "")
