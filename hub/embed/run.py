"""A run of `bifocal embed`: its settings, its tasks, and what they did."""

import os
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from bifocal.data.parallel import Execution, TaskFailed, run_tasks
from bifocal.data.paths import expand, is_remote
from bifocal.data.source import Source
from bifocal.data.splits import split_source
from bifocal.data.worker_processes import available_cores
from bifocal.embedding.models import EmbeddingModel, load_model, weights_hash
from bifocal.errors import BifocalError
from bifocal.hub.embed.arguments import EmbedError
from bifocal.hub.embed.parts import PartWriter
from bifocal.hub.embed.settings import PartRecord, RunSettings, Speed
from bifocal.hub.embed.task import MakeWorker, Task, TaskDone, done_before, is_complete
from bifocal.hub.item_reader import IMAGE_KINDS, ItemReader, image_files, infer_kind
from bifocal.modeling.dtype_bifocal import default_device, resolve_dtype
from bifocal.progress import no_progress_bars

_POLL = 2.0  # seconds between looks at the parts that other processes have written


@dataclass
class EmbedSummary:
    """What a run did.

    Args:
        new: rows that were embedded in this run.
        known: rows that earlier runs embedded.
        skipped: name and reason of each row that could not be embedded.
        ignored: files that were not read as images, counted in words.
        failed: name and message of each split that could not be read or embedded to its end.
        finished: what was done when all parts were written, in words.
    """

    new: int = 0
    known: int = 0
    skipped: list[tuple[str, str]] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    failed: list[TaskFailed] = field(default_factory=list)
    finished: str = ""


@dataclass(frozen=True)
class Choices:
    """What a user chooses for a run; see `RunSettings`.

    Args:
        kind: kind of the rows; inferred if None.
        dim: number of leading dimensions; all if None.
        dtype: one of `DTYPE_CHOICES`.
        query: embed texts as queries, not as documents.
    """

    model: str
    kind: str | None = None
    captions: bool = False
    dim: int | None = None
    precision: str = "float32"
    dtype: str | None = None
    query: bool = False
    fast_decoding: bool = False
    thumbnails: bool = True
    rows_per_part: int = 4096


def embed_source(
    source: Source, parts: PartWriter, choices: Choices, speed: Speed = Speed(), execution: Execution = Execution(),
    exclude: Sequence[Path] = (), progress: Callable[[int], None] = lambda rows: None,
) -> EmbedSummary:  # fmt: skip
    """Embed the rows of a source and write them as parts; a killed run resumes with the parts that are missing.

    Args:
        source: source to read.
        parts: where the table is written.
        execution: one process, several, or a Ray cluster. The rows are the same.
        exclude: folders that are not read, such as the table itself.
        progress: called with the number of rows that were read since the last call, about.

    Raises:
        DataError: if the source cannot be read.
        ModelError: if the model cannot be loaded, or does not embed what the source holds.
        EmbedError: if the table was written with other settings.
    """
    kind = infer_kind(source, choices.kind)
    splits = [source] if image_files(source) is not None else split_source(source, kind)
    settings, model = _settings(source, kind, choices)
    parts.start(settings)
    written = _written(parts, splits, source)
    wanted = execution.workers if execution.ray is None else execution.concurrency or execution.workers
    strides = max(1, -(-wanted // len(splits)))
    summary = EmbedSummary(ignored=_ignored(source, kind, splits, exclude))
    tasks = []
    for number, split in enumerate(splits):
        of_split = written.get(number, {})
        whole = Task(number, split, written=of_split)
        if is_complete(whole):
            _add(summary, done_before(whole))
        else:
            tasks += [Task(number, split, stride, strides, of_split) for stride in range(strides)]
    in_this_process = execution.ray is None and min(execution.workers, len(tasks)) <= 1
    here: dict[str, Any] = {"on_rows": progress, "loaded": model} if in_this_process else {}
    if not in_this_process:
        del model
        if speed.num_workers is None and execution.workers > 1:
            speed = replace(speed, num_workers=max(1, available_cores() // execution.workers))
    worker = MakeWorker(settings, speed, parts, tuple(exclude), **here)
    with _Watch(
        parts,
        sum(map(len, written.values())),
        settings.rows_per_part,
        progress,
        active=bool(tasks) and not in_this_process,
    ):
        for outcome in run_tasks(tasks, worker, execution, lambda task: task.name):
            if isinstance(outcome, TaskFailed):
                summary.failed.append(outcome)
            else:
                _add(summary, outcome)
    if not summary.failed:
        summary.finished = parts.finish()
    return summary


def _written(parts: PartWriter, splits: Sequence[Source], source: Source) -> dict[int, dict[str, dict[str, Any]]]:
    """Return the records of the parts that need not be written again, by the number of their split and by name.

    Raises:
        EmbedError: if a part is of another split than the source has under its number.
    """
    written: dict[int, dict[str, dict[str, Any]]] = {}
    for name, values in parts.written().items():
        number, record = int(name.split("-")[1]), PartRecord.from_dict(values)
        now = splits[number].title if number < len(splits) else None
        if record.split != now:
            there = f"'{now}' is" if now is not None else "nothing is"
            raise EmbedError(
                f"The files of '{source.title}' have changed: '{record.split}' was file {number + 1}, and {there} now. "
                "Embed them into another folder."
            )
        if not record.is_cut:
            written.setdefault(number, {})[name] = values
    return written


def _ignored(source: Source, kind: str, splits: Sequence[Source], exclude: Sequence[Path]) -> list[str]:
    """Return which files of a folder of shards are not read, in words; a single split says that when it is read."""
    if len(splits) == 1:
        return []
    reader = ItemReader(source, kind, exclude=tuple(exclude))
    reader.count_files_outside_shards()
    return reader.ignored_files()


def expected_rows(source: Source) -> int | None:
    """Return how many rows a source has where that is quick to know: of Parquet files; None elsewhere."""
    paths = [source.path] if isinstance(source.path, str) else source.path
    if any(map(is_remote, paths)):
        return None
    files = [file for path in paths for file in expand(path)]
    if not files or not all(file.endswith(".parquet") and os.path.isfile(file) for file in files):
        return None
    with suppress(OSError, ValueError):
        count = sum(pq.read_metadata(file).num_rows for file in files)
        return count if source.limit is None else min(count, source.limit)
    return None


def _settings(source: Source, kind: str, choices: Choices) -> tuple[RunSettings, EmbeddingModel]:
    weights = weights_hash(choices.model)
    dtype = resolve_dtype(choices.dtype, default_device())
    with no_progress_bars():
        model = load_model(choices.model, dtype)
    if kind in IMAGE_KINDS:
        model.require_images()
    if choices.fast_decoding and model.image_preparer(True).smallest_side is None:
        raise EmbedError(f"Images for '{choices.model}' can only be decoded at full size. Omit --fast-decoding.")
    dimensions = model.dimensions if choices.dim is None else choices.dim
    if not 1 <= dimensions <= model.dimensions:
        raise EmbedError(
            f"The model has {model.dimensions} dimensions; choose --dim from 1 to {model.dimensions}, not {dimensions}."
        )
    role = "query" if choices.query else "document"
    settings = RunSettings(
        source=source.model_dump(exclude_defaults=True), kind=kind, captions=choices.captions, model=choices.model,
        weights=weights, dimensions=dimensions, precision=choices.precision, dtype=model.dtype, role=role,
        prompt=model.prompts.get(role, ""), query_prompt=model.prompts.get("query", ""),
        fast_decoding=choices.fast_decoding, thumbnails=choices.thumbnails,
        rows_per_part=choices.rows_per_part, model_dimensions=model.dimensions,
    )  # fmt: skip
    return settings, model


def _add(summary: EmbedSummary, done: TaskDone) -> None:
    summary.new += done.new
    summary.known += done.known
    summary.skipped += done.skipped
    summary.ignored += done.ignored


class _Watch:
    """Reports the parts that other processes write, as rows, while it is entered."""

    def __init__(
        self, parts: PartWriter, before: int, rows_per_part: int, progress: Callable[[int], None], active: bool
    ) -> None:
        self.parts, self.seen, self.rows_per_part, self.progress = parts, before, rows_per_part, progress
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True) if active else None

    def _run(self) -> None:
        while not self._ended.wait(_POLL):
            try:
                count = self.parts.count()
            except (BifocalError, OSError):  # of the store; what is wrong is said where parts are written
                continue
            self.progress((count - self.seen) * self.rows_per_part)
            self.seen = count

    def __enter__(self) -> None:
        if self._thread is not None:
            self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
