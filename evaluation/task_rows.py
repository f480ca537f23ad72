"""Rows of evaluation tasks: read once, counted, and the same for every model."""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from bifocal.data.beir import is_beir, whole_beir
from bifocal.data.inspection import rows_of
from bifocal.data.schema import Strict
from bifocal.data.skips import Fault, Skip, Skipped
from bifocal.data.source import Source
from bifocal.errors import EvaluationError, RecipeError
from bifocal.evaluation import protocols
from bifocal.evaluation.encoders import Encoder
from bifocal.evaluation.protocols import Result

_READ_AS = {
    "image-text-retrieval": "image-text", "zero-shot": "image-label", "linear-probe": "image-label",
    "sts": "scored-pair", "pair-classification": "scored-pair", "text-retrieval": "text-pair",
}  # fmt: skip


class EvaluationTask(Strict):
    """
    Args:
        name: of the data set, for tables.
        kind: the protocol.
        data: the source of its rows; for text retrieval pairs, whose different positives are the corpus, or a BEIR
            folder.
        train: for a linear probe, the rows to fit on.
        templates: sentences with `{}` in the place of a class name.
        classes: the name of each label, where labels are no names. Labels that no row has are classes, too.
        threshold: for pair classification, from which score on a pair is positive.
        ks: of Recall@k and nDCG@k.
    """

    name: str
    kind: Literal["image-text-retrieval", "zero-shot", "linear-probe", "sts", "pair-classification", "text-retrieval"]
    data: Source
    train: Source | None = None
    templates: list[str] = list(protocols.TEMPLATES)
    classes: dict[str, str] = {}
    threshold: float = 0.5
    ks: list[Annotated[int, Field(ge=1)]] = [1, 5, 10]


@dataclass
class TaskRows:
    """What a task is measured on.

    Args:
        names: of the rows, as their files name them.
        columns: by name; of text retrieval the queries, the corpus, and the ids of right passages.
        skips: rows that were skipped in reading.
        count: rows looked at.
        digest: changes with the rows and their images.
        joined: by the name of a row those of further rows of its image.
    """

    names: list[str] = field(default_factory=list)
    columns: dict[str, Any] = field(default_factory=dict)
    skips: list[Skip] = field(default_factory=list)
    count: int = 0
    digest: str = ""
    joined: dict[str, list[str]] = field(default_factory=dict)


class KeptImages(Sequence):
    """Images of a task: paths, and files in place of bytes, which are read when they are asked for."""

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
    """The rows of a task, and of a linear probe those to fit on."""

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
        """Run the task's protocol.

        Raises:
            EvaluationError: if there is nothing to evaluate on.
        """
        result = self._run(encoder)
        result.rows = self.digest
        found = [
            skip._replace(row=row) for skip in result.skips for row in (skip.row, *self.rows.joined.get(skip.row, []))
        ]
        result.skips = [*self.rows.skips, *(self.train.skips if self.train is not None else []), *found]
        return result

    def _run(self, encoder: Encoder) -> Result:
        task, columns, names = self.task, self.rows.columns, self.rows.names
        if task.kind == "text-retrieval":
            return protocols.text_retrieval(encoder, task.name, **columns, ks=task.ks)
        if task.kind == "image-text-retrieval":
            return protocols.image_text_retrieval(
                encoder, task.name, columns["image"], columns["caption"], task.ks, names
            )
        if task.kind == "zero-shot":
            numbers, classes = _classes(task, columns["label"])
            return protocols.zero_shot(encoder, task.name, columns["image"], numbers, classes, task.templates, names)
        if self.train is not None:
            fit, test = ((part["image"], part["label"]) for part in (self.train.columns, columns))
            return protocols.linear_probe(encoder, task.name, fit, test, names, self.train.names)
        first, second, scores = columns["first"], columns["second"], columns["score"]
        if task.kind == "sts":
            return protocols.semantic_similarity(encoder, task.name, first, second, scores, names)
        labels = [int(score >= task.threshold) for score in scores]
        return protocols.pair_classification(encoder, task.name, first, second, labels, names)


def read_task(task: EvaluationTask, scratch: Path, skipped: Skipped) -> TaskData:
    """Read the rows of a task.

    Args:
        scratch: folder in which images that are given as bytes wait, so that memory holds none of them.
        skipped: where rows are accounted for if they are too many to go on.

    Raises:
        EvaluationError: if no row can be used.
        RecipeError: if there is nothing at the path, or no such column.
        BadRowsError: if more rows are bad than the source's `max_bad` allows.
    """
    rows = _retrieval_rows(task) if task.kind == "text-retrieval" else _read(task.data, _READ_AS[task.kind], scratch)
    _require_good(rows, task.data, task.name, skipped)
    if task.kind == "image-text-retrieval":
        _by_image(rows)
    if task.kind != "linear-probe":
        return TaskData(task, rows)
    if task.train is None:
        raise RecipeError(f"The linear probe '{task.name}' needs rows to fit on; name them under train.")
    train = _read(task.train, "image-label", scratch)
    _require_good(train, task.train, task.name, skipped)
    return TaskData(task, rows, train)


def account(data: TaskData, result: Result, skipped: Skipped) -> None:
    """Log the rows that were skipped.

    Raises:
        BadRowsError: if they are too many.
    """
    skipped.add(data.task.name, data.count, result.skips)
    skipped.check(data.task.name, data.task.data.max_bad, ended=True)


def _require_good(rows: TaskRows, source: Source, name: str, skipped: Skipped) -> None:
    counts = Skipped()
    counts.add(name, rows.count, rows.skips)
    if counts.share(name) > source.max_bad:
        skipped.add(name, rows.count, rows.skips)
        skipped.check(name, source.max_bad, ended=True)
    if rows.count == len(rows.skips):
        raise EvaluationError(f"'{name}' has no row that can be used; look at {source.title}.")


def _read(source: Source, kind: str, scratch: Path) -> TaskRows:
    found = TaskRows()
    digest = hashlib.blake2b(digest_size=16)
    for row_name, row in rows_of(source, kind):
        if source.limit is not None and len(found.names) >= source.limit:
            break
        found.count += 1
        if isinstance(row, Fault):
            found.skips.append(Skip.of(row_name, row))
            continue
        if "image" in row:
            row["image"], mark = _kept_image(row["image"], scratch)
            digest.update(mark.encode())
        others = {column: value for column, value in row.items() if column != "image"}
        digest.update(json.dumps(others, default=str).encode())
        found.names.append(row_name)
        for column, value in row.items():
            found.columns.setdefault(column, KeptImages() if column == "image" else []).append(value)
    found.digest = digest.hexdigest()
    return found


def _kept_image(image: Any, scratch: Path) -> tuple[Any, str]:
    """Return the image, as a file if it was bytes, and what changes when it does."""
    if isinstance(image, bytes):
        mark = hashlib.blake2b(image, digest_size=16).hexdigest()
        (scratch / mark).write_bytes(image)
        return scratch / mark, mark
    try:
        facts = os.stat(image)
    except (OSError, TypeError, ValueError):
        return image, repr(image)[:1000]
    return image, f"{image} {facts.st_size} {facts.st_mtime_ns}"


def _by_image(rows: TaskRows) -> None:
    """Join the captions of rows with one `image_id`, which show one image."""
    first: dict[Any, int] = {}
    joined: dict[int, list[str]] = {}
    for number, (image_id, caption) in enumerate(zip(rows.columns["image_id"], rows.columns["caption"], strict=True)):
        place = first.setdefault(image_id, number)
        joined.setdefault(place, []).extend(caption if isinstance(caption, list) else [caption])
        if place != number:
            rows.joined.setdefault(rows.names[place], []).append(rows.names[number])
    images = KeptImages()
    for number in joined:
        images.append(rows.columns["image"].values[number])
    rows.names = [rows.names[number] for number in joined]
    rows.columns = {"image": images, "caption": list(joined.values())}


def _retrieval_rows(task: EvaluationTask) -> TaskRows:
    """Queries, corpus and right passages of a BEIR folder or of pairs, of which equal texts are one."""
    folder = os.path.expanduser(task.data.path) if isinstance(task.data.path, str) else ""
    if os.path.isdir(folder) and is_beir(folder):
        queries, corpus, relevant, faults = whole_beir(folder, task.data.split)
        rows = TaskRows(skips=[Skip.of(*fault) for fault in faults], count=len(faults) + len(queries) + len(corpus))
    else:
        rows = _read(task.data, "text-pair", Path())
        columns = rows.columns or {"query": [], "positive": []}
        queries, corpus, relevant = _as_retrieval(zip(columns["query"], columns["positive"], strict=True))
    rows.columns = {"queries": queries, "corpus": corpus, "relevant": relevant}
    rows.digest = hashlib.blake2b(json.dumps(rows.columns).encode(), digest_size=16).hexdigest()
    return rows


def _as_retrieval(pairs: Iterable[tuple[Any, Any]]) -> tuple[dict[str, str], dict[str, str], dict[str, list[str]]]:
    corpus: dict[str, str] = {}
    queries: dict[str, str] = {}
    relevant: dict[str, list[str]] = {}
    for asked, answers in pairs:
        for query in asked if isinstance(asked, list) else [asked]:
            for positive in answers if isinstance(answers, list) else [answers]:
                queries[query], corpus[positive] = query, positive
                relevant.setdefault(query, []).append(positive)
    return queries, corpus, relevant


def _classes(task: EvaluationTask, labels: list[str]) -> tuple[list[int], list[str]]:
    """Return the number of each row's class, and the names of all classes.

    Raises:
        RecipeError: if the recipe names classes of other labels.
    """
    seen = set(labels)
    if task.classes and not seen & set(task.classes):
        some = ", ".join(sorted(seen)[:4])
        raise RecipeError(f"The classes of '{task.name}' match none of its labels (such as {some}). Correct `classes`.")
    every = sorted(seen | set(task.classes))
    numbers = {label: number for number, label in enumerate(every)}
    return [numbers[label] for label in labels], [task.classes.get(label, label) for label in every]
