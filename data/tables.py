"""Rows on disk: a stream written once to the cache of `datasets`, bad rows with their causes included."""

import hashlib
import json
import os
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from bifocal.data.filters import Cleaning, DuplicateFilter
from bifocal.data.image_decoding import image_paths
from bifocal.data.kinds import KINDS
from bifocal.data.labels import class_names, with_class_names
from bifocal.data.near_duplicates import filter_near_duplicates
from bifocal.data.paths import MISSING, existing, is_remote
from bifocal.data.row_names import ROW, RowNames, with_row_names
from bifocal.data.shards import ShardStream
from bifocal.data.skips import ERROR_COLUMN, RowError, SkipLog, SkippedRow
from bifocal.data.source import Source
from bifocal.data.text_files import Row
from bifocal.errors import DataError

_VERSION = 5  # of the cached rows; raise it when they change
_PEEKED = 100  # rows read to learn whether a column holds lists


def to_dataset(stream: ShardStream, source: Source, skipped: SkipLog, name: str, mark: str | None = None) -> Any:
    """Return the good rows of a stream as a `datasets.Dataset`, cached until a file changes.

    Args:
        mark: a fingerprint of the rows, which with the source is the key of the cache; None takes the files' sizes and
            times.

    Raises:
        BadRowsError: if more rows are bad than the source's `max_bad_fraction` allows.
        DataError: if there are no rows, or no good ones.
        OSError: if the cache cannot be written.
    """
    fingerprint = rows_fingerprint(source, stream.kind, mark or stream.shards)
    arguments = {"stream": stream, "source": source, "features": row_features(stream, source)}
    dataset = _cached(arguments, fingerprint)
    # Images that were missing when the rows were cached may exist now.
    returned = [skip.row for skip in _skips(dataset) if skip.cause == MISSING and existing(skip.detail) is not None]
    if returned:
        salted = hashlib.blake2b(json.dumps([fingerprint, returned]).encode(), digest_size=12).hexdigest()
        dataset = _cached(arguments, salted)
    dataset = _good_rows(dataset, source, skipped, name, len(stream.shards))
    if source.clean is not None and source.clean.compares_signatures:
        dataset = filter_near_duplicates(dataset, source.clean, skipped, name)
    if source.clean is not None and source.clean.consistency is not None:
        from bifocal.data.consistency import filter_consistent

        dataset = filter_consistent(dataset, source.clean.consistency, skipped, name)
    return dataset


def rows_fingerprint(source: Source, kind: str, rows: Sequence[str] | str) -> str:
    """Return a digest of what the rows of a source depend on.

    Args:
        rows: the files, by their sizes and times; or a fingerprint of the rows.
    """
    settings = source.model_dump(mode="json", exclude={"streaming", "max_bad_fraction"})
    # Relative paths mean other files in another working directory, also if these have the same sizes and times.
    roots = source.image_root.values() if isinstance(source.image_root, dict) else filter(None, [source.image_root])
    absolute = [os.path.abspath(os.path.expanduser(root)) for root in roots]
    mark = rows if isinstance(rows, str) else [file_stamp(shard) for shard in rows]
    return hashlib.blake2b(json.dumps([_VERSION, settings, kind, mark, absolute]).encode(), digest_size=12).hexdigest()


def _cached(arguments: dict[str, Any], fingerprint: str) -> Any:
    from datasets import Dataset, Features, Value

    features = Features({**arguments["features"], ERROR_COLUMN: Value("string"), ROW: Value("string")})
    try:
        with _quiet():
            return Dataset.from_generator(_rows, features, gen_kwargs=arguments, fingerprint=fingerprint)
    except Exception as error:
        raise _root(error) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide progress bars if the output is not a terminal."""
    from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    was_off = are_progress_bars_disabled()
    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        yield
    finally:
        if not was_off:
            enable_progress_bars()


def _good_rows(dataset: Any, source: Source, skipped: SkipLog, name: str, shards: int) -> Any:
    """Return the good rows and log the others."""
    skips = _skips(dataset)
    lost = sum(skip.file_lost for skip in skips)
    skipped.add(name, len(dataset), skips, shards=shards - lost)
    skipped.check(name, source.max_bad_fraction, ended=True)
    row_errors = dataset.select_columns([ERROR_COLUMN])[ERROR_COLUMN]
    kept = [row for row, row_error in enumerate(row_errors) if row_error is None] if skips else range(len(dataset))
    if not kept:
        raise skipped.no_rows(source.title, name)
    good = dataset.remove_columns([ERROR_COLUMN, ROW])
    return with_row_names(good.select(kept) if skips else good, RowNames(dataset.select_columns([ROW]), kept))


def _skips(dataset: Any) -> list[SkippedRow]:
    row_errors = dataset.select_columns([ERROR_COLUMN])[ERROR_COLUMN]
    return [SkippedRow(*json.loads(row_error)) for row_error in row_errors if row_error is not None]


def row_features(stream: ShardStream, source: Source) -> Any:
    """Return the `datasets.Features` of a stream's rows, inferred from the first ones.

    Raises:
        DataError: if it has no rows.
    """
    from datasets import Features, Image, List, Value

    rows = [row for _, row in islice(stream.rows(), _PEEKED)]
    if not rows:
        raise DataError(f"'{source.title}' has no rows.")
    lists = list_columns(stream, rows)
    features: dict[str, Any] = {}
    for column in stream.column_names:
        text = Value("string")
        single = Value("float64") if column == "score" else text
        features[column] = Image(decode=False) if column == "image" else List(text) if column in lists else single
    return Features(features)


def list_columns(stream: ShardStream, first: Sequence[dict[str, Any] | RowError] | None = None) -> set[str]:
    """Return the columns of a stream that hold lists of texts, inferred from the first rows.

    Args:
        first: these rows, if they were read.
    """
    rows = [row for _, row in islice(stream.rows(), _PEEKED)] if first is None else first
    good = [row for row in rows if not isinstance(row, RowError)]
    names = stream.column_names
    return {c for c in names if c in ("negatives", "caption") or any(isinstance(row[c], list) for row in good)}


def selected_rows(
    stream: ShardStream, source: Source, lists: Collection[str] | None
) -> Iterator[tuple[str, dict[str, Any] | RowError]]:
    """Yield rows with their names, exact duplicates as `RowError`, up to the source's limit of good ones.

    Args:
        lists: the columns that may hold lists; None allows all.
    """
    require_new = DuplicateFilter(source.clean or Cleaning())
    good = 0
    for name, row in stream.rows():
        if not isinstance(row, RowError):
            try:
                allowed = row if lists is None else lists
                mixed = [column for column, value in row.items() if isinstance(value, list) and column not in allowed]
                if mixed:
                    raise RowError(f"a list as {mixed[0]}", "other rows have one text")
                require_new(row)
                good += 1
            except RowError as row_error:
                row = row_error
        yield name, row
        if good == source.limit:
            return


def uniform_rows(stream: ShardStream, source: Source, features: Any) -> Iterator[tuple[str, dict[str, Any] | RowError]]:
    """Yield the selected rows with their names, the values of good ones as the features of the stream have them."""
    from datasets import List

    lists = {column for column, feature in features.items() if isinstance(feature, List)}
    for name, row in selected_rows(stream, source, lists):
        if isinstance(row, RowError):
            yield name, row
            continue
        values = {c: [v] if c in lists and not isinstance(v, list) else v for c, v in row.items()}
        if "image" in values:
            kept = "bytes" if isinstance(values["image"], bytes) else "path"
            values["image"] = {"bytes": None, "path": None, kept: values["image"]}
        yield name, values


def _rows(stream: ShardStream, source: Source, features: Any) -> Iterator[dict[str, Any]]:
    """Yield rows for `Dataset.from_generator`: good ones, and empty ones with the cause."""
    empty = dict.fromkeys(stream.column_names)
    for name, row in uniform_rows(stream, source, features):
        if isinstance(row, RowError):
            yield {**empty, ERROR_COLUMN: json.dumps(SkippedRow.of(name, row)), ROW: name}
        else:
            yield {**row, ERROR_COLUMN: None, ROW: name}


def normalise_dataset(
    dataset: Any, source: Source, normalise: Callable[[str, Any], dict[str, Any]], skipped: SkipLog, name: str
) -> Any:
    """Return the good rows of a data set that `datasets` loaded, with the columns of the kind."""
    kind = normalise.normalise.kind  # type: ignore[attr-defined]
    if source.streaming:
        columns = [*KINDS[kind], *(["image_id"] if "image" in KINDS[kind] else []), ERROR_COLUMN]
        drop = [column for column in dataset.column_names or [] if column not in columns]
        batch = _Batch(normalise, columns, source.title, {} if kind == "scored-pair" else class_names(dataset.features))
        return dataset.map(batch, batched=True, with_indices=True, remove_columns=drop)
    caption = normalise.normalise.column_of("caption", dataset.column_names)  # type: ignore[attr-defined]
    plain = caption in dataset.column_names and caption not in class_names(dataset.features)
    if kind == "image-text" and source.clean is None and plain:
        return _with_captions(dataset, source, normalise, skipped, name)
    names = {} if kind == "scored-pair" else class_names(dataset.features)
    stream = ShardStream([source.title], _TableReader(dataset, names), normalise, kind, None)
    return to_dataset(stream, source, skipped, name, mark=dataset._fingerprint)


def _with_captions(dataset: Any, source: Source, normalise: Any, skipped: SkipLog, name: str) -> Any:
    """Return the rows with good captions; images, which may be many gigabytes, are neither read nor copied."""
    steps = normalise.normalise
    named = {ours: steps.column_of(ours, dataset.column_names) for ours in ("image", "caption", "image_id")}
    good, skips = [], []
    paths = image_paths(dataset, named["image"])
    for number, value in enumerate(dataset.select_columns([named["caption"]])[named["caption"]]):
        try:
            steps.texts("caption", {named["caption"]: value})
            if paths is not None and paths[number] is not None:
                steps.allowed_roots.resolve(paths[number])
            good.append(number)
        except RowError as row_error:
            skips.append(SkippedRow.of(f"{source.title}:{number}", row_error))
    skipped.add(name, len(dataset), skips)
    skipped.check(name, source.max_bad_fraction, ended=True)
    dataset = dataset.select_columns([theirs for theirs in named.values() if theirs is not None])
    dataset = dataset if not skips else dataset.select(good)
    dataset = dataset.rename_columns({theirs: ours for ours, theirs in named.items() if theirs not in (None, ours)})
    return with_row_names(dataset, RowNames(source.title, good))


class _TableReader:
    """Reads the rows of a `datasets.Dataset`; a position is a number of rows."""

    def __init__(self, dataset: Any, names: dict[str, list[str]]) -> None:
        self.dataset, self.names = dataset, names

    def __call__(self, title: str, start: Any = None) -> Iterator[Row]:
        for number in range(start or 0, len(self.dataset)):
            yield Row(number + 1, f"{title}:{number}", with_class_names(self.dataset[number], self.names))


class _Batch:
    """Normalises rows of an `IterableDataset`; a bad row stays, with its cause in `ERROR_COLUMN`."""

    def __init__(
        self,
        normalise: Callable[[str, Any], dict[str, Any]],
        columns: list[str],
        title: str,
        names: dict[str, list[str]],
    ) -> None:
        self.normalise, self.columns, self.title, self.names = normalise, columns, title, names

    def __call__(self, batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        normalised: dict[str, list[Any]] = {column: [] for column in self.columns}
        for number, index in enumerate(indices):
            name = f"{self.title}:{index}"
            row: dict[str, Any]
            try:
                raw = {column: values[number] for column, values in batch.items()}
                row = self.normalise(name, with_class_names(raw, self.names))
            except RowError as row_error:
                row = {ERROR_COLUMN: json.dumps(SkippedRow.of(name, row_error))}
            for column, values in normalised.items():
                values.append(row.get(column))
        return normalised


def file_stamp(shard: str) -> list[Any]:
    """Return what changes when a file does, after its path: its size and time."""
    try:
        if is_remote(shard):
            import fsspec

            filesystem, inner = fsspec.url_to_fs(shard)
            info = filesystem.info(inner)
            return [shard, info.get("size"), str(info.get("ETag") or info.get("last_commit") or info.get("mtime"))]
        shard = os.path.abspath(os.path.expanduser(shard))
        if os.path.isdir(shard):  # a folder's own time does not change with its files
            inside = sorted(path for path in Path(shard).rglob("*") if path.is_file())
            return [shard, [[str(p), p.stat().st_size, p.stat().st_mtime_ns] for p in inside]]
        status = os.stat(shard)
        return [shard, status.st_size, status.st_mtime_ns]
    except OSError:
        return [shard, None]


def _root(error: BaseException) -> BaseException:
    """Return the error that `datasets` wrapped into its own."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error
