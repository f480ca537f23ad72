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

from bifocal.data.kinds import KINDS
from bifocal.data.labels import class_names, with_class_names
from bifocal.data.paths import MISSING, existing, is_remote
from bifocal.data.row_names import ROW, RowNames, with_row_names
from bifocal.data.shards import ShardStream
from bifocal.data.skips import FAULT, Fault, Skip, Skipped
from bifocal.data.source import Source
from bifocal.data.text_files import Row
from bifocal.errors import DataError

_VERSION = 2  # of how rows are made; a change here makes caches of before useless
_PEEKED = 100  # rows that are looked at to know whether a column holds lists


def materialise(stream: ShardStream, source: Source, skipped: Skipped, name: str, mark: str | None = None) -> Any:
    """All good rows of a stream as a `datasets.Dataset`, cached as long as the files stay as they are.

    Args:
        mark: what changes when the rows do, beside the source; the files' sizes and times when None.

    Raises:
        BadRowsError: more than the source's `max_bad`.
        DataError: no row, or no good one.
        OSError: the cache cannot be written.
    """
    from datasets import Features, List

    settings = source.model_dump(mode="json", exclude={"streaming", "max_bad"})
    # Relative paths mean other files in another working directory, also if these have the same sizes and times.
    roots = source.images.values() if isinstance(source.images, dict) else filter(None, [source.images])
    absolute = [os.path.abspath(os.path.expanduser(root)) for root in roots]
    about = [_VERSION, settings, stream.kind, mark or [_stamp(shard) for shard in stream.shards], absolute]
    fingerprint = hashlib.blake2b(json.dumps(about).encode(), digest_size=12).hexdigest()
    features = _features(stream, source)
    lists = {column for column, feature in features.items() if isinstance(feature, List)}
    arguments = {"stream": stream, "limit": source.limit, "lists": lists}
    found = _cached(Features(features), arguments, fingerprint)
    # Images that were missing when the rows were cached may be there now.
    returned = [skip.row for skip in _skips(found) if skip.cause == MISSING and existing(skip.detail) is not None]
    if returned:
        salted = hashlib.blake2b(json.dumps([fingerprint, returned]).encode(), digest_size=12).hexdigest()
        found = _cached(Features(features), arguments, salted)
    found = _account(found, source, skipped, name, len(stream.shards))
    if source.clean is not None and source.clean.consistency is not None:
        from bifocal.data.consistency import consistent

        found = consistent(found, source.clean.consistency, skipped, name)
    return found


def _cached(features: Any, arguments: dict[str, Any], fingerprint: str) -> Any:
    from datasets import Dataset

    try:
        with _quiet():
            return Dataset.from_generator(_rows, features, gen_kwargs=arguments, fingerprint=fingerprint)
    except Exception as error:
        raise _root(error) from error


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
    skips = _skips(found)
    lost = sum(skip.shard for skip in skips)
    skipped.add(name, len(found), skips, shards=shards - lost)
    skipped.check(name, source.max_bad, ended=True)
    faults = found.select_columns([FAULT])[FAULT]
    kept = [row for row, fault in enumerate(faults) if fault is None] if skips else range(len(found))
    if not kept:
        raise DataError(f"'{source.title}' has no row that can be used{skipped.example(name)}.")
    good = found.remove_columns([FAULT, ROW])
    return with_row_names(good.select(kept) if skips else good, RowNames(found.select_columns([ROW]), kept))


def _skips(found: Any) -> list[Skip]:
    faults = found.select_columns([FAULT])[FAULT]
    return [Skip(*json.loads(fault)) for fault in faults if fault is not None]


def _features(stream: ShardStream, source: Source) -> dict[str, Any]:
    from datasets import Image, List, Value

    rows = [row for _, row in islice(stream.rows(), _PEEKED)]
    if not rows:
        raise DataError(f"'{source.title}' has no rows.")
    first = [row for row in rows if not isinstance(row, Fault)]
    if getattr(stream.normalise, "keep", None) is not None:
        stream.normalise.keep.seen.clear()  # type: ignore[attr-defined]  # what was only peeked at comes again
    features: dict[str, Any] = {}
    for column in stream.column_names:
        text = Value("string")
        lists = column in ("negatives", "caption") or any(isinstance(row[column], list) for row in first)
        one = Value("float64") if column == "score" else text
        features[column] = Image(decode=False) if column == "image" else List(text) if lists else one
    return {**features, FAULT: Value("string"), ROW: Value("string")}


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
            yield {**empty, FAULT: json.dumps(Skip.of(name, row)), ROW: name}
            continue
        good += 1
        values = {c: [v] if c in lists and not isinstance(v, list) else v for c, v in row.items()}
        if "image" in values:
            kept = "bytes" if isinstance(values["image"], bytes) else "path"
            values["image"] = {"bytes": None, "path": None, kept: values["image"]}
        yield {**values, FAULT: None, ROW: name}


def checked(
    found: Any, source: Source, normalise: Callable[[str, Any], dict[str, Any]], skipped: Skipped, name: str
) -> Any:
    """A data set that `datasets` loaded, with the columns of the kind and without its bad rows."""
    kind = normalise.steps.kind  # type: ignore[attr-defined]
    if source.streaming:
        columns = [*KINDS[kind], *(["image_id"] if "image" in KINDS[kind] else []), FAULT]
        drop = [column for column in found.column_names or [] if column not in columns]
        batch = _Batch(normalise, columns, source.title, {} if kind == "scored-pair" else class_names(found.features))
        return found.map(batch, batched=True, with_indices=True, remove_columns=drop)
    named = normalise.steps.column_of("caption", found.column_names) in class_names(found.features)  # type: ignore[attr-defined]
    if kind == "image-text" and source.clean is None and not named:
        return _with_captions(found, source, normalise, skipped, name)
    names = {} if kind == "scored-pair" else class_names(found.features)
    stream = ShardStream([source.title], _TableReader(found, names), normalise, kind, None)
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
    found = found.rename_columns({theirs: ours for ours, theirs in named.items() if theirs not in (None, ours)})
    return with_row_names(found, RowNames(source.title, good))


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

    def __init__(self, found: Any, names: dict[str, list[str]]) -> None:
        self.found, self.names = found, names

    def __call__(self, title: str, start: Any = None) -> Iterator[Row]:
        for number in range(start or 0, len(self.found)):
            yield Row(number + 1, f"{title}:{number}", with_class_names(self.found[number], self.names))


class _Batch:
    """Normalises rows of an `IterableDataset`; a bad row stays, with its cause in a column of its own."""

    def __init__(
        self,
        normalise: Callable[[str, Any], dict[str, Any]],
        columns: list[str],
        title: str,
        names: dict[str, list[str]],
    ) -> None:
        self.normalise, self.columns, self.title, self.names = normalise, columns, title, names

    def __call__(self, batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        made: dict[str, list[Any]] = {column: [] for column in self.columns}
        for place, index in enumerate(indices):
            name = f"{self.title}:{index}"
            row: dict[str, Any]
            try:
                raw = {column: values[place] for column, values in batch.items()}
                row = self.normalise(name, with_class_names(raw, self.names))
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
        shard = os.path.abspath(os.path.expanduser(shard))
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
