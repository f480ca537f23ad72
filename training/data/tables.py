"""Rows on disk: a stream written once to `datasets`' cache, its bad rows with their causes beside the good ones."""

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from bifocal.training.data.faults import Fault, Skip, Skipped
from bifocal.training.data.files import Row
from bifocal.training.data.places import is_remote
from bifocal.training.data.shards import ShardStream
from bifocal.training.recipe import Source
from bifocal.training.streams import FAULT
from bifocal.training.tasks import KINDS, TrainingError

_VERSION = 2  # of how rows are made; a change here makes caches of before useless
_PEEKED = 100  # rows that are looked at to know whether a column holds lists


def materialise(stream: ShardStream, source: Source, skipped: Skipped, name: str, mark: str | None = None) -> Any:
    """All good rows of a stream as a `datasets.Dataset`, cached as long as the files stay as they are.

    Args:
        mark: what changes when the rows do, beside the source; the files' sizes and times when None.

    Raises:
        BadRowsError: more than the source's `max_bad`.
        TrainingError: no good row.
        OSError: the cache cannot be written.
    """
    from datasets import Dataset, Features, List

    settings = source.model_dump(mode="json", exclude={"streaming", "max_bad"})
    about = [_VERSION, settings, stream.kind, mark or [_stamp(shard) for shard in stream.shards]]
    fingerprint = hashlib.blake2b(json.dumps(about).encode(), digest_size=12).hexdigest()
    features = _features(stream)
    lists = {column for column, feature in features.items() if isinstance(feature, List)}
    arguments = {"stream": stream, "limit": source.limit, "lists": lists}
    try:
        with _quiet():
            found = Dataset.from_generator(_rows, Features(features), gen_kwargs=arguments, fingerprint=fingerprint)
    except Exception as error:
        raise _root(error) from error
    found = _account(found, source, skipped, name, len(stream.shards))
    if source.clean is not None and source.clean.consistency is not None:
        from bifocal.training.data.consistency import consistent

        found = consistent(found, source.clean.consistency, skipped, name)
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars where nobody watches them."""
    from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    was_off = are_progress_bars_disabled()
    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        yield
    finally:
        if not was_off:
            enable_progress_bars()


def _account(found: Any, source: Source, skipped: Skipped, name: str, shards: int) -> Any:
    """The good rows; the others go into the account."""
    faults = found.select_columns([FAULT])[FAULT] if len(found) else []
    skips, kept = [], []
    for row, fault in enumerate(faults):
        if fault is None:
            kept.append(row)
        else:
            skips.append(Skip(*json.loads(fault)))
    lost = sum(skip.shard for skip in skips)
    skipped.add(name, len(found), skips, shards=shards - lost)
    skipped.check(name, source.max_bad, ended=True)
    if not kept:
        raise TrainingError(f"'{source.title}' has no row that can be used; look at its files and columns.")
    good = found if len(kept) == len(found) else found.select(kept)
    return good.remove_columns([FAULT])


def _features(stream: ShardStream) -> dict[str, Any]:
    from datasets import Image, List, Value

    first = [row for _, row in islice(stream.rows(), _PEEKED) if not isinstance(row, Fault)]
    if getattr(stream.normalise, "keep", None) is not None:
        stream.normalise.keep.seen.clear()  # type: ignore[attr-defined]  # what was only peeked at comes again
    features: dict[str, Any] = {}
    for column in stream.column_names:
        text = Value("string")
        lists = column in ("negatives", "caption") or any(isinstance(row[column], list) for row in first)
        features[column] = Image(decode=False) if column == "image" else List(text) if lists else text
    return {**features, FAULT: Value("string")}


def _rows(stream: ShardStream, limit: int | None, lists: set[str]) -> Iterator[dict[str, Any]]:
    """Rows for `Dataset.from_generator`: good ones, and empty ones with the cause."""
    empty = dict.fromkeys(stream.column_names)
    good = 0
    for name, row in stream.rows():
        if limit is not None and good >= limit:
            return
        if not isinstance(row, Fault):
            mixed = next((c for c, v in row.items() if isinstance(v, list) and c not in lists), None)
            if mixed is not None:
                row = Fault(f"a list as {mixed}", "other rows have one text")
        if isinstance(row, Fault):
            yield {**empty, FAULT: json.dumps(Skip.of(name, row))}
            continue
        good += 1
        values = {c: [v] if c in lists and not isinstance(v, list) else v for c, v in row.items()}
        if "image" in values:
            kept = "bytes" if isinstance(values["image"], bytes) else "path"
            values["image"] = {"bytes": None, "path": None, kept: values["image"]}
        yield {**values, FAULT: None}


def checked(
    found: Any, source: Source, normalise: Callable[[str, Any], dict[str, Any]], skipped: Skipped, name: str
) -> Any:
    """A data set that `datasets` loaded, with the columns of the kind and without its bad rows."""
    kind = normalise.steps.kind  # type: ignore[attr-defined]
    if source.streaming:
        columns = [*KINDS[kind], *(["image_id"] if "image" in KINDS[kind] else []), FAULT]
        drop = [column for column in found.column_names or [] if column not in columns]
        return found.map(_Batch(normalise, columns, source.title), batched=True, with_indices=True, remove_columns=drop)
    if kind == "image-text" and source.clean is None:
        return _with_captions(found, source, normalise, skipped, name)
    stream = ShardStream([source.title], _TableReader(found), normalise, kind, None)
    return materialise(stream, source, skipped, name, mark=found._fingerprint)


def _with_captions(found: Any, source: Source, normalise: Any, skipped: Skipped, name: str) -> Any:
    """The rows with good captions; pictures are neither looked at nor copied, they may be many gigabytes."""
    steps = normalise.steps
    named = {ours: steps.column_of(ours, found.column_names) for ours in ("image", "caption", "image_id")}
    good, skips = [], []
    paths = _paths(found, named["image"])
    for number, value in enumerate(found.select_columns([named["caption"]])[named["caption"]]):
        try:
            steps.texts("caption", {named["caption"]: value})
            if paths is not None and paths[number] is not None:
                steps.fence.resolve(paths[number])
            good.append(number)
        except Fault as fault:
            skips.append(Skip.of(f"{source.title}:{number}", fault))
    skipped.add(name, len(found), skips)
    skipped.check(name, source.max_bad, ended=True)
    found = found.select_columns([theirs for theirs in named.values() if theirs is not None])
    found = found if not skips else found.select(good)
    return found.rename_columns({theirs: ours for ours, theirs in named.items() if theirs not in (None, ours)})


def _paths(found: Any, column: str) -> list[str | None] | None:
    """Where pictures are that a data set does not hold as bytes; their bytes, where it does, are not looked at."""
    import pyarrow as pa
    import pyarrow.compute as pc

    values = found.with_format("arrow").select_columns([column])[:][column]
    if not pa.types.is_struct(values.type):
        return values.to_pylist() if pa.types.is_string(values.type) else None
    held = pc.is_valid(pc.struct_field(values, "bytes"))
    return pc.if_else(held, None, pc.struct_field(values, "path")).to_pylist()


class _TableReader:
    """The rows of a `datasets.Dataset`; a position is a number of rows."""

    def __init__(self, found: Any) -> None:
        self.found = found

    def __call__(self, title: str, start: Any = None) -> Iterator[Row]:
        for number in range(start or 0, len(self.found)):
            yield Row(number + 1, f"{title}:{number}", self.found[number])


class _Batch:
    """Normalises rows of an `IterableDataset`; a bad row stays, with its cause in a column of its own."""

    def __init__(self, normalise: Callable[[str, Any], dict[str, Any]], columns: list[str], title: str) -> None:
        self.normalise, self.columns, self.title = normalise, columns, title

    def __call__(self, batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        made: dict[str, list[Any]] = {column: [] for column in self.columns}
        for place, index in enumerate(indices):
            name = f"{self.title}:{index}"
            row: dict[str, Any]
            try:
                row = self.normalise(name, {column: values[place] for column, values in batch.items()})
            except Fault as fault:
                row = {FAULT: json.dumps(Skip.of(name, fault))}
            for column, values in made.items():
                values.append(row.get(column))
        return made


def _stamp(shard: str) -> list[Any]:
    """What changes when a file does."""
    try:
        if is_remote(shard):
            import fsspec

            filesystem, inner = fsspec.url_to_fs(shard)
            info = filesystem.info(inner)
            return [shard, info.get("size"), str(info.get("ETag") or info.get("last_commit") or info.get("mtime"))]
        if os.path.isdir(shard):  # a folder that is read as one: what it holds, for it does not change with its files
            inside = sorted(path for path in Path(shard).rglob("*") if path.is_file())
            return [shard, [[str(p), p.stat().st_size, p.stat().st_mtime_ns] for p in inside]]
        found = os.stat(shard)
        return [shard, found.st_size, found.st_mtime_ns]
    except OSError:
        return [shard, None]


def _root(error: BaseException) -> BaseException:
    """What `datasets` wraps into its own error."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error
