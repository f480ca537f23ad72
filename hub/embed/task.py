"""One task of a run: read a split of a source, embed its rows and write them as parts."""

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bifocal.data.source import Source
from bifocal.embedding.embed import EmbedSettings, embed_items
from bifocal.embedding.items import Item, ItemError
from bifocal.embedding.models import EmbeddingModel, load_model, weights_hash
from bifocal.hub.embed.arguments import EmbedError
from bifocal.hub.embed.parts import PartWriter
from bifocal.hub.embed.settings import PartRecord, RunSettings, Speed
from bifocal.hub.embed.table import row, to_table
from bifocal.hub.item_reader import ItemReader
from bifocal.progress import no_progress_bars

_ITEMS_AT_ONCE = 256  # of a part, or a few batches; a shard's images are in memory until they are embedded
_BATCHES_AT_ONCE = 4


@dataclass(frozen=True)
class Task:
    """A split of a source, or every few parts of it.

    Args:
        split: number of the split.
        source: the split.
        stride, strides: of the split's parts, those whose number divided by `strides` leaves `stride`.
            Every task of a split reads all of its rows, but embeds only its own.
        written: records of the split's parts that were written before, by name.
    """

    split: int
    source: Source
    stride: int = 0
    strides: int = 1
    written: Mapping[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.source.title

    def part_name(self, number: int) -> str:
        return f"part-{self.split:05d}-{number:06d}"


@dataclass(frozen=True)
class TaskDone:
    """What a task did.

    Args:
        new: rows that were embedded.
        known: rows of parts that were written before.
        skipped: name and reason of each row that could not be embedded, in old and new parts.
        ignored: files that were not read as images, counted in words.
    """

    new: int
    known: int
    skipped: list[tuple[str, str]]
    ignored: list[str]


@dataclass(frozen=True)
class MakeWorker:
    """Loads the model once in each process; see `run_tasks`.

    Args:
        settings: of the run.
        speed: batches and threads.
        parts: where parts are written.
        exclude: folders that are not read, such as the table itself.
        on_rows: called with the number of rows that were read since the last call.
        loaded: the model, for a run in the process that loaded it.
    """

    settings: RunSettings
    speed: Speed
    parts: PartWriter
    exclude: tuple[Path, ...] = ()
    on_rows: Callable[[int], None] | None = None
    loaded: EmbeddingModel | None = None

    def __call__(self) -> Callable[[Task], TaskDone]:
        settings, model = self.settings, self.loaded
        if model is not None:
            return lambda task: run_task(task, model, self)
        # On another machine, the same path or id may hold another model.
        weights = weights_hash(settings.model)
        if weights != settings.weights:
            raise EmbedError(f"'{settings.model}' has other weights here ({weights}, not {settings.weights}).")
        with no_progress_bars():
            loaded = load_model(settings.model, settings.dtype)
        return lambda task: run_task(task, loaded, self)


def run_task(task: Task, model: EmbeddingModel, worker: MakeWorker) -> TaskDone:
    """Embed the rows of a task that are not written yet.

    Raises:
        EmbedError: if the source has changed since the parts were written.
        DataError: if the source cannot be read.
    """
    settings, speed = worker.settings, worker.speed
    embed = EmbedSettings(
        settings.role, settings.prompt, speed.batch_size, speed.num_workers, settings.fast_decoding,
        settings.thumbnails,
    )  # fmt: skip
    reader = ItemReader(task.source, settings.kind, settings.captions, worker.exclude)
    new = known = 0
    skipped: list[tuple[str, str]] = []
    part = _Part(0)
    at_once = max(_ITEMS_AT_ONCE, _BATCHES_AT_ONCE * speed.batch_size)
    for items, errors, is_end in _chunks(reader, settings.rows_per_part, at_once):
        is_own = part.number % task.strides == task.stride
        name = task.part_name(part.number)
        before = task.written.get(name)
        part.read(items, errors)
        if is_own and before is None:
            part.embed(items, model, embed)
        if worker.on_rows is not None and is_own:
            worker.on_rows(len(items))
        if part.size < settings.rows_per_part and not is_end:
            continue
        record = part.record(is_end, _files(task.source) if is_end else [], task.name, reader.is_cut)
        if before is not None:
            recorded = PartRecord.from_dict(before)
            changed = (recorded.digest, recorded.is_last) != (record.digest, record.is_last)
            if changed and record.is_cut:
                reason = part.skipped[-1][1] if part.skipped else "a file is missing"
                raise EmbedError(f"'{task.name}' cannot be read to its end ({reason}). Run the command again.")
            if changed:
                raise EmbedError(
                    f"'{task.name}' has changed since its part '{name}' was written. Embed it into another folder."
                )
            record = recorded
            known += is_own * record.rows
        elif is_own:
            worker.parts.write(name, to_table(part.rows, settings), record.to_dict())
            new += len(part.rows)
        if is_own:
            skipped += record.skipped
        part = _Part(part.number + 1)
    later = [name for name in task.written if int(name.rpartition("-")[2]) >= part.number]
    if later and not reader.is_cut:
        raise EmbedError(
            f"'{task.name}' has changed since its part '{later[0]}' was written. Embed it into another folder."
        )
    return TaskDone(new, known, skipped, reader.ignored_files() if task.stride == 0 else [])


class _Part:
    """The rows of a part as they are read."""

    def __init__(self, number: int) -> None:
        self.number, self.size = number, 0
        self.rows: list[dict[str, Any]] = []
        self.skipped: list[tuple[str, str]] = []
        self._digest = hashlib.blake2b(digest_size=8)

    def read(self, items: list[Item], errors: list[tuple[str, str]]) -> None:
        self.size += len(items)
        self.skipped += errors
        for item in items:
            size = os.path.getsize(item.image) if isinstance(item.image, str) and os.path.isfile(item.image) else 0
            size = len(item.image) if isinstance(item.image, bytes) else size
            content = f"{item.kind}\0{item.name}\0{item.text}\0{size}\0"
            self._digest.update(content.encode("utf-8", "surrogatepass"))

    def embed(self, items: list[Item], model: EmbeddingModel, settings: EmbedSettings) -> None:
        keys: list[str] = []
        readable: list[Item] = []
        for item in items:
            try:
                keys.append(item.key())
                readable.append(item)
            except ItemError as error:
                self.skipped.append((item.name, str(error)))
        for key, result in zip(keys, embed_items(readable, model, settings), strict=True):
            if result.vector is None:
                self.skipped.append((result.item.name, result.error))
            else:
                self.rows.append(row(key, result))

    def record(self, is_last: bool, files: list[list[Any]], split: str, is_cut: bool) -> PartRecord:
        is_cut &= is_last
        return PartRecord(
            self.size, self._digest.hexdigest(), is_last, self.skipped, files, split, is_cut, len(self.rows)
        )


def _chunks(
    reader: ItemReader, rows_per_part: int, at_once: int
) -> Iterator[tuple[list[Item], list[tuple[str, str]], bool]]:
    """Yield a few items at once, the errors of rows between them, and whether the source ends.

    No chunk crosses the end of a part.
    """
    known_errors = 0

    def errors() -> list[tuple[str, str]]:
        nonlocal known_errors
        new = reader.skipped[known_errors:]
        known_errors += len(new)
        return new

    items: list[Item] = []
    in_part = 0
    for item in reader.items():
        if len(items) == min(at_once, rows_per_part - in_part):
            # Only now, so that the last items of a source are known to be the last.
            in_part = (in_part + len(items)) % rows_per_part
            yield items, errors(), False
            items = []
        items.append(item)
    yield items, errors(), True


def _files(source: Source) -> list[list[Any]]:
    """Return path, bytes and modification time of a source's files; none unless all are local files."""
    paths = [source.path] if isinstance(source.path, str) else source.path
    files = [os.path.abspath(os.path.expanduser(path)) for path in paths]
    if not all(map(os.path.isfile, files)):
        return []
    return [[path, os.path.getsize(path), os.stat(path).st_mtime_ns] for path in files]


def is_complete(task: Task) -> bool:
    """Return whether a split needs no reading: all its parts are written, and its files are as they were."""
    numbers = sorted(int(name.rpartition("-")[2]) for name in task.written)
    if numbers != list(range(len(numbers))) or not numbers:
        return False
    last = PartRecord.from_dict(task.written[task.part_name(numbers[-1])])
    return last.is_last and bool(last.files) and last.files == _files(task.source)


def done_before(task: Task) -> TaskDone:
    """Return what a complete split holds."""
    records = [PartRecord.from_dict(record) for record in task.written.values()]
    skipped = [skip for record in records for skip in record.skipped]
    return TaskDone(0, sum(record.rows for record in records), skipped, [])
