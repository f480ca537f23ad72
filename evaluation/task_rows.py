"""The rows of an evaluation task: read once, counted, and the same for every model."""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bifocal.data.beir import is_beir, load_beir
from bifocal.data.evaluation_protocols import PROTOCOLS
from bifocal.data.loading import iter_rows
from bifocal.data.skips import RowError, SkipLog, SkippedRow
from bifocal.data.source import Source
from bifocal.errors import EvaluationError, RecipeError
from bifocal.evaluation import protocols
from bifocal.evaluation.encoders import Encoder
from bifocal.evaluation.protocols import Result
from bifocal.evaluation.suites import EvaluationTask


@dataclass
class TaskRows:
    """The rows that a task is measured on, or that a linear probe is fitted on.

    Args:
        names: name of each row in its file.
        columns: values of all rows by column; for text retrieval `queries`, `corpus` and `relevant`, the ids of the
            relevant passages by query.
        skips: rows that were skipped while reading.
        count: rows read, skipped ones included.
        digest: hash of the rows and their images.
        joined: names of further rows that show the same image, by the name of the row they were joined to.
    """

    names: list[str] = field(default_factory=list)
    columns: dict[str, Any] = field(default_factory=dict)
    skips: list[SkippedRow] = field(default_factory=list)
    count: int = 0
    digest: str = ""
    joined: dict[str, list[str]] = field(default_factory=dict)


class StoredImages(Sequence):
    """The images of a task. Those given as bytes lie in files, which are read when an image is accessed."""

    def __init__(self) -> None:
        self.values: list[Any] = []

    def append(self, value: Any) -> None:
        self.values.append(value)

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, number: Any) -> Any:
        value = self.values[number]
        return value.read_bytes() if isinstance(value, Path) else value


@dataclass
class TaskData:
    """A task with its rows.

    Args:
        task: the task.
        rows: the rows to measure on.
        train: the rows that a linear probe is fitted on.
    """

    task: EvaluationTask
    rows: TaskRows
    train: TaskRows | None = None

    @property
    def digest(self) -> str:
        return self.rows.digest + (self.train.digest if self.train is not None else "")

    @property
    def count(self) -> int:
        return self.rows.count + (self.train.count if self.train is not None else 0)

    def measure(self, encoder: Encoder) -> Result:
        """Return the result of the task's protocol.

        Raises:
            EvaluationError: if there is nothing to evaluate on.
        """
        result = self._run_protocol(encoder)
        result.rows = self.digest
        in_protocol = [
            skip._replace(row=row) for skip in result.skips for row in (skip.row, *self.rows.joined.get(skip.row, []))
        ]
        result.skips = [*self.rows.skips, *(self.train.skips if self.train is not None else []), *in_protocol]
        return result

    def _run_protocol(self, encoder: Encoder) -> Result:
        task, columns, names = self.task, self.rows.columns, self.rows.names
        if task.kind == "text-retrieval":
            return protocols.text_retrieval(encoder, task.name, **columns, ks=task.ks)
        if task.kind == "image-text-retrieval":
            return protocols.image_text_retrieval(
                encoder, task.name, columns["image"], columns["caption"], task.ks, names
            )
        if task.kind == "zero-shot":
            numbers, classes = _class_numbers(task, columns["label"])
            return protocols.zero_shot(encoder, task.name, columns["image"], numbers, classes, task.templates, names)
        if self.train is not None:
            train, test = ((part["image"], part["label"]) for part in (self.train.columns, columns))
            return protocols.linear_probe(encoder, task.name, train, test, names, self.train.names)
        first, second, scores = columns["first"], columns["second"], columns["score"]
        if task.kind == "sts":
            return protocols.semantic_similarity(encoder, task.name, first, second, scores, names)
        labels = [int(score >= task.threshold) for score in scores]
        return protocols.pair_classification(encoder, task.name, first, second, labels, names)


def read_task(task: EvaluationTask, scratch: Path, skipped: SkipLog) -> TaskData:
    """Read the rows of a task.

    Args:
        task: the task to read.
        scratch: folder for images that are given as bytes, so that they do not fill the memory.
        skipped: log of the skipped rows if there are too many of them.

    Raises:
        EvaluationError: if no row can be used.
        RecipeError: if there is nothing at the path, or no such column.
        BadRowsError: if more rows are bad than the source's `max_bad_fraction` allows.
    """
    if task.kind == "text-retrieval":
        rows = _read_retrieval(task)
    else:
        rows = _read(task.data, PROTOCOLS[task.kind].row_kind, scratch)
    _require_good_rows(rows, task.data, task.name, skipped)
    if task.kind == "image-text-retrieval":
        _join_by_image(rows)
    if task.kind != "linear-probe":
        return TaskData(task, rows)
    if task.train is None:
        raise RecipeError(f"The linear probe '{task.name}' needs rows to fit on; set train.")
    train = _read(task.train, PROTOCOLS[task.kind].row_kind, scratch)
    _require_good_rows(train, task.train, task.name, skipped)
    return TaskData(task, rows, train)


def log_skips(data: TaskData, result: Result, skipped: SkipLog) -> None:
    """Log the rows that were skipped.

    Raises:
        BadRowsError: if more rows are bad than the source's `max_bad_fraction` allows.
    """
    skipped.add(data.task.name, data.count, result.skips)
    skipped.check(data.task.name, data.task.data.max_bad_fraction, ended=True)


def _require_good_rows(rows: TaskRows, source: Source, name: str, skipped: SkipLog) -> None:
    counts = SkipLog()
    counts.add(name, rows.count, rows.skips)
    if counts.share(name) > source.max_bad_fraction:
        skipped.add(name, rows.count, rows.skips)
        skipped.check(name, source.max_bad_fraction, ended=True)
    if rows.count == len(rows.skips):
        raise EvaluationError(f"'{name}' has no row that can be used; look at {source.title}.")


def _read(source: Source, row_kind: str, scratch: Path) -> TaskRows:
    rows = TaskRows()
    digest = hashlib.blake2b(digest_size=16)
    for row_name, row in iter_rows(source, row_kind):
        rows.count += 1
        if isinstance(row, RowError):
            rows.skips.append(SkippedRow.of(row_name, row))
            continue
        if "image" in row:
            row["image"], fingerprint = _store_image(row["image"], scratch)
            digest.update(fingerprint.encode())
        others = {column: value for column, value in row.items() if column != "image"}
        digest.update(json.dumps(others, default=str).encode())
        rows.names.append(row_name)
        for column, value in row.items():
            rows.columns.setdefault(column, StoredImages() if column == "image" else []).append(value)
    rows.digest = digest.hexdigest()
    return rows


def _store_image(image: Any, scratch: Path) -> tuple[Any, str]:
    """Return the image, as a file if it was bytes, and a string that changes with the image."""
    if isinstance(image, bytes):
        digest = hashlib.blake2b(image, digest_size=16).hexdigest()
        (scratch / digest).write_bytes(image)
        return scratch / digest, digest
    try:
        facts = os.stat(image)
    except (OSError, TypeError, ValueError):
        return image, repr(image)[:1000]
    return image, f"{image} {facts.st_size} {facts.st_mtime_ns}"


def _join_by_image(rows: TaskRows) -> None:
    """Join the captions of rows with the same `image_id`: they show the same image."""
    first_rows: dict[Any, int] = {}
    captions: dict[int, list[str]] = {}
    for number, (image_id, caption) in enumerate(zip(rows.columns["image_id"], rows.columns["caption"], strict=True)):
        first = first_rows.setdefault(image_id, number)
        captions.setdefault(first, []).extend(caption if isinstance(caption, list) else [caption])
        if first != number:
            rows.joined.setdefault(rows.names[first], []).append(rows.names[number])
    images = StoredImages()
    for number in captions:
        images.append(rows.columns["image"].values[number])
    rows.names = [rows.names[number] for number in captions]
    rows.columns = {"image": images, "caption": list(captions.values())}


def _read_retrieval(task: EvaluationTask) -> TaskRows:
    """Read queries, corpus and relevant passages from a BEIR folder, or from pairs, where equal texts are one."""
    folder = os.path.expanduser(task.data.path) if isinstance(task.data.path, str) else ""
    if os.path.isdir(folder) and is_beir(folder):
        queries, corpus, relevant, skips = load_beir(folder, task.data.split)
        rows = TaskRows(skips=skips, count=len(skips) + len(queries) + len(corpus))
    else:
        rows = _read(task.data, PROTOCOLS[task.kind].row_kind, Path())
        columns = rows.columns or {"query": [], "positive": []}
        queries, corpus, relevant = _retrieval_of_pairs(zip(columns["query"], columns["positive"], strict=True))
    rows.columns = {"queries": queries, "corpus": corpus, "relevant": relevant}
    rows.digest = hashlib.blake2b(json.dumps(rows.columns).encode(), digest_size=16).hexdigest()
    return rows


def _retrieval_of_pairs(
    pairs: Iterable[tuple[Any, Any]],
) -> tuple[dict[str, str], dict[str, str], dict[str, list[str]]]:
    corpus: dict[str, str] = {}
    queries: dict[str, str] = {}
    relevant: dict[str, list[str]] = {}
    for query_or_list, positive_or_list in pairs:
        for query in query_or_list if isinstance(query_or_list, list) else [query_or_list]:
            for positive in positive_or_list if isinstance(positive_or_list, list) else [positive_or_list]:
                queries[query], corpus[positive] = query, positive
                relevant.setdefault(query, []).append(positive)
    return queries, corpus, relevant


def _class_numbers(task: EvaluationTask, labels: list[str]) -> tuple[list[int], list[str]]:
    """Return the number of each row's class, and the names of all classes.

    Raises:
        RecipeError: if the suite names classes for other labels.
    """
    in_rows = set(labels)
    if task.classes and not in_rows & set(task.classes):
        some = ", ".join(sorted(in_rows)[:4])
        raise RecipeError(f"The classes of '{task.name}' match none of its labels (such as {some}). Correct `classes`.")
    all_labels = sorted(in_rows | set(task.classes))
    numbers = {label: number for number, label in enumerate(all_labels)}
    return [numbers[label] for label in labels], [task.classes.get(label, label) for label in all_labels]
