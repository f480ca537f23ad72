"""Load a source as a data set with the columns of one kind of rows."""

import json
import logging
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from typing import Any

from bifocal.data.beir import is_beir
from bifocal.data.columns import MissingColumnError, require_columns
from bifocal.data.corpora import corpus
from bifocal.data.filters import Cleaning, RowFilter
from bifocal.data.image_decoding import disable_image_decoding
from bifocal.data.kinds import INFERRED, KINDS
from bifocal.data.leakage import Content, filter_leaks, read_content
from bifocal.data.locate import SourceSplit, holds_files, is_files, locate
from bifocal.data.normalize import COLUMN_LAYOUTS, ColumnLayout, RowNormaliser, as_is, dpr
from bifocal.data.paths import AllowedRoots, DatasetsRoots
from bifocal.data.readers import IMAGE_SUFFIXES, READERS
from bifocal.data.row_names import ROW, RowNames, rows_of
from bifocal.data.schema import validated
from bifocal.data.shards import ShardStream
from bifocal.data.skips import ERROR_COLUMN, RowError, SkipLog, SkippedRow
from bifocal.data.source import Source
from bifocal.data.tables import list_columns, normalise_dataset, selected_rows, to_dataset
from bifocal.errors import DataError, first_line

logger = logging.getLogger(__name__)

_CORPUS = "corpus:"
_PEEKED = 20  # rows read to infer their kind


def load_source(
    source: Source | str, kind: str, seed: int = 0, skipped: SkipLog | None = None, name: str | None = None
) -> Any:
    """Return the rows of a source, with the columns of a kind.

    Args:
        source: a source, or its path.
        kind: kind of the rows, one of `bifocal.data.kinds.KINDS`.
        seed: seed for the order of files in a stream, and for generated data sets.
        skipped: log that counts and lists skipped rows.
        name: name of the task in messages and in the log; None means the source's path.

    Returns:
        A `datasets.Dataset`, or with `streaming` a `ShardStream` (files) or an `IterableDataset` (the Hub). Images
        are not decoded.

    Raises:
        DataError: if there is nothing at the path, a column is missing, or a filter cannot work on a stream.
        BadRowsError: if more rows are bad than `max_bad_fraction` allows.
    """
    source = named_source(Source(path=source) if isinstance(source, str) else source)
    skipped = SkipLog() if skipped is None else skipped
    name = name or source.title
    if source.path == "symbols":
        from bifocal.data.symbols import SymbolsConfig, build_symbols

        size = int(source.name) if source.name else 32
        symbols = build_symbols(SymbolsConfig(image_size=size, seed=seed))[source.split]
        return with_columns(symbols, source, KINDS[kind])
    if source.streaming:
        _require_streamable(source)
    stream = open_stream(source, kind, seed)
    if stream is not None:
        if source.streaming:
            return stream
        return _without_leaks(to_dataset(stream, source, skipped, name), source, skipped, name)
    dataset = disable_image_decoding(_from_hub(source))
    layout = COLUMN_LAYOUTS.get(source.format or "", as_is)
    if layout is as_is:
        require_columns(dataset.column_names, source, kind)
    path = os.path.expanduser(source.path) if isinstance(source.path, str) else ""
    allowed_roots = DatasetsRoots(path if os.path.isdir(path) else None)
    dataset = normalise_dataset(dataset, source, normaliser(source, kind, allowed_roots, layout), skipped, name)
    return _without_leaks(dataset, source, skipped, name)


def _without_leaks(dataset: Any, source: Source, skipped: SkipLog, name: str) -> Any:
    """Return the rows of a data set that are not in the sources of `exclude_rows_of`.

    Raises:
        DataError: if no row is left.
    """
    if source.clean is not None and source.clean.exclude_rows_of:
        dataset = filter_leaks(dataset, source.clean, excluded_contents(source.clean), skipped, name)
    if not source.streaming and not len(dataset):
        raise skipped.no_rows(source.title, name)
    return dataset


def excluded_contents(cleaning: Cleaning) -> list[tuple[str, Content]]:
    """Return the titles and contents of the sources of `exclude_rows_of`.

    Raises:
        DataError: if a source cannot be read, or nothing of it can be compared.
    """
    evaluations = []
    for about in cleaning.exclude_rows_of:
        source = validated(Source, {"path": about} if isinstance(about, str) else about, [])
        content = read_content(iter_rows(source, compared_kind(source)))
        if content.skipped:
            logger.warning(f"{content.skipped:,} rows of '{source.title}' cannot be read, so they exclude nothing.")
        evaluations.append((source.title, content))
    return evaluations


def open_stream(source: Source, kind: str, seed: int | None = None) -> ShardStream | None:
    """Return the files of a source as a stream, also if it does not set `streaming`; None for a data set of the Hub.

    Raises:
        DataError: if there is nothing at the path, or its format is unknown.
    """
    source = named_source(source)
    files = locate(source, kind)
    if files is None:
        return None
    allowed_roots = AllowedRoots(source.image_root if source.image_root is not None else files.root)
    own_folders = files.own_folders and source.image_root is None
    ambiguous = source.ambiguous if isinstance(source, SourceSplit) else files.ambiguous
    normalise = normaliser(source, kind, allowed_roots, files.layout)
    return ShardStream(files.paths, files.read, normalise, kind, seed, ambiguous, own_folders)


def normaliser(
    source: Source, kind: str, allowed_roots: AllowedRoots, layout: ColumnLayout = as_is
) -> Callable[[str, Any], dict[str, Any]]:
    """Return a function from a row of a source to a row of a kind, filters included."""
    normalise = RowNormaliser(kind, source.mapped_columns, allowed_roots, source.num_negatives)
    layout = partial(dpr, negatives=source.num_negatives) if layout is dpr else layout
    return RowPipeline(layout, normalise, RowFilter(source.clean) if source.clean is not None else None)


class RowPipeline:
    """Column layout, normalisation and filter of a row; a class, since closures cannot be sent to data workers."""

    def __init__(self, layout: ColumnLayout, normalise: RowNormaliser, row_filter: RowFilter | None) -> None:
        self.layout, self.normalise, self.filter = layout, normalise, row_filter

    def __call__(self, name: str, raw: Any, folder: str | None = None) -> dict[str, Any]:
        row = self.normalise(name, self.layout(raw), folder)
        return row if self.filter is None else self.filter(row)


def iter_rows(source: Source, kind: str, one_layout: bool = False) -> Iterator[tuple[str, dict[str, Any] | RowError]]:
    """Yield every row of a source with its name, in order; a row that is bad or filtered is a `RowError`.

    Args:
        one_layout: whether a list where other rows have one text is bad, as when the source is loaded.

    Raises:
        DataError: if the source cannot be read, or a filter cannot work on a stream.
    """
    clean = source.clean if source.clean is not None and source.path != "symbols" else Cleaning()
    stream = None if clean.compares_rows else open_stream(source, kind)
    if stream is not None:
        yield from selected_rows(stream, source, list_columns(stream) if one_layout else None)
        return
    if clean.needs_whole:
        yield from _compared_rows(source, kind)
        return
    source = source.model_copy(update={"streaming": source.path != "symbols"})
    for number, row in enumerate(load_source(source, kind)):
        row_error = row.pop(ERROR_COLUMN, None)
        if row_error is not None:
            name, cause, detail, filtered, file_lost = json.loads(row_error)
            yield name, RowError(cause, detail, filtered, file_lost)
            continue
        image = row.get("image")
        if isinstance(image, list):
            image = image[0]
        if isinstance(image, dict):
            row["image"] = image["bytes"] if image["bytes"] is not None else image["path"]
        name = f"{source.title}:{number}"
        if image is not None:
            row.setdefault("image_id", name)
        yield name, row


def _compared_rows(source: Source, kind: str) -> Iterator[tuple[str, dict[str, Any] | RowError]]:
    """Yield the rows of a source that is loaded as a whole, and each that is skipped in its place."""
    skipped = _SkippedRows()
    data = load_source(source.model_copy(update={"max_bad_fraction": 1.0}), kind, skipped=skipped)
    names: RowNames = data.row_names
    kept = iter(names.rows)
    following = next(kept, None)
    good = rows_of(data)
    for number, name in enumerate(names.source[ROW]):
        if number == following:
            yield next(good)
            following = next(kept, None)
            continue
        skips = skipped.by_name[name]
        skip = skips.pop(0) if len(skips) > 1 else skips[0]
        yield name, RowError(skip.cause, skip.detail, skip.filtered, skip.file_lost)


class _SkippedRows(SkipLog):
    """Keeps each skipped row, by its name."""

    def __init__(self) -> None:
        super().__init__()
        self.by_name: defaultdict[str, list[SkippedRow]] = defaultdict(list)

    def add(self, task: str, rows: int, skips: Iterable[SkippedRow] = (), shards: int = 0) -> None:
        skips = list(skips)
        for skip in skips:
            self.by_name[skip.row].append(skip)
        super().add(task, rows, skips, shards)


def infer_kind(source: Source) -> str:
    """Return the kind of rows that fits a source's layout and columns.

    Raises:
        DataError: if there is no such source, or its columns fit no kind.
    """
    if _is_corpus(source):
        return corpus(source.title.removeprefix(_CORPUS)).kind
    paths = [source.path] if isinstance(source.path, str) else source.path
    folder = os.path.expanduser(paths[0])
    if os.path.isdir(folder) and is_beir(folder):
        return "text-pair"
    names: list[str] | None = None
    problems: list[tuple[str, RowError]] = []
    for kind in INFERRED:
        try:
            stream = open_stream(source, kind)
        except MissingColumnError as error:
            names = error.names
            continue
        if stream is None:  # `datasets` knows the columns without reading all rows
            names = _columns_elsewhere(source)
            fitting = [kind for kind in INFERRED if names and _has_columns(names, source, kind)]
            if fitting:
                return fitting[0]
            break
        rows = list(islice(stream.rows(), _PEEKED))
        if not all(isinstance(row, RowError) for _, row in rows):
            return kind
        problems += [(name, row) for name, row in rows[:1] if isinstance(row, RowError)]
    if names and not problems:
        raise DataError(
            f"Cannot infer the kind of rows of '{source.title}' from its columns ({', '.join(names[:20])}). Name it "
            "with --kind, and the columns with column_mapping, such as column_mapping.title=query."
        )
    # Read as another kind, a row has a column missing; prefer an error that is about the row itself.
    problem = next((problem for problem in problems if not problem[1].cause.startswith("no ")), None)
    problem = problem or next(iter(problems), None)
    reason = f"; none of the first can be used ({problem[0]}: {problem[1]})" if problem is not None else ""
    raise DataError(f"Cannot infer the kind of rows of '{source.title}'{reason}. Name it with --kind.")


def compared_kind(source: Source) -> str:
    """Return the kind of rows that a source is read as: labels of images and scores of texts are not compared.

    Raises:
        DataError: if its columns fit no kind.
    """
    try:
        return infer_kind(source)
    except DataError:
        for kind in ("image-only", "scored-pair"):
            try:
                rows = list(islice(iter_rows(source.model_copy(update={"clean": None}), kind), _PEEKED))
            except DataError:
                continue
            if not all(isinstance(row, RowError) for _, row in rows):
                return kind
        raise


def _columns_elsewhere(source: Source) -> list[str] | None:
    folder = os.path.expanduser(source.path) if isinstance(source.path, str) else ""
    if os.path.isdir(folder) and not holds_files(folder, (*READERS, "webdataset")):
        raise DataError(f"{_not_loaded(source.title, folder)}.")
    return _from_hub(source.model_copy(update={"streaming": True})).column_names


def _has_columns(names: list[str], source: Source, kind: str) -> bool:
    try:
        require_columns(names, source, kind)
    except MissingColumnError:
        return False
    return True


def named_source(source: Source) -> Source:
    """Return the source that `corpus:NAME` stands for; others as they are."""
    return corpus(source.title.removeprefix(_CORPUS)).to_source(source) if _is_corpus(source) else source


def _is_corpus(source: Source) -> bool:
    return isinstance(source.path, str) and source.path.startswith(_CORPUS)


def _require_streamable(source: Source) -> None:
    if source.clean is not None and source.clean.needs_whole:
        raise DataError(
            f"'{source.title}' streams, but duplicates and inconsistent pairs can only be found among all rows. Run "
            "`bifocal data clean` first, or remove streaming."
        )
    if source.limit is not None and _is_files_source(source):
        raise DataError(
            f"'{source.title}' streams, and limit cannot count the rows of a stream. Name fewer files, "
            "or remove streaming."
        )


def _is_files_source(source: Source) -> bool:
    paths = [source.path] if isinstance(source.path, str) else source.path
    return any(is_files(path) or os.path.exists(path) for path in paths)


def _from_hub(source: Source) -> Any:
    from datasets import load_dataset

    options: dict[str, Any] = dict(split=source.split, streaming=source.streaming)
    path = source.path if isinstance(source.path, str) else None
    if path is None:
        raise DataError(f"'{source.title}': a list of paths may hold files only, not Hub ids.")
    folder = os.path.expanduser(path)
    try:
        dataset = load_dataset(folder, source.name, **options)
    except Exception as error:
        raise DataError(f"{_not_loaded(path, folder)} ({_innermost(error)}).") from error
    return dataset.take(source.limit) if source.limit is not None else dataset


def _not_loaded(path: str, folder: str) -> str:
    if os.path.isdir(folder):
        return f"'{path}' is a folder in which no rows can be found{_held(folder)}"
    if os.path.exists(folder):
        return f"'{path}' is a file of unknown format; set format"
    if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path):
        return f"There is no file or folder '{path}', and no data set of this name could be loaded from the Hub"
    return f"There is nothing at '{path}'; check the path"


def _held(folder: str) -> str:
    """Return what a folder holds, and what is missing if these are images, as the end of a sentence."""
    endings = Counter(name.rpartition(".")[2].lower() for _, _, files in os.walk(folder) for name in files)
    images = sum(count for ending, count in endings.items() if ending in IMAGE_SUFFIXES)
    if images:
        return f"; it holds {images:,} images, but no metadata.jsonl or metadata.csv with their captions"
    return f"; it holds {', '.join(f'{count:,} .{ending}' for ending, count in endings.most_common(4))}"


def with_columns(dataset: Any, source: Source, columns: tuple[str, ...]) -> Any:
    """Return the first `limit` rows of a data set without bad rows, with the columns of a kind."""
    if source.limit is not None:
        dataset = dataset.take(source.limit)
    kept = {source.mapped_columns.get(ours, ours): ours for ours in (*columns, "image_id")}
    missing = [theirs for theirs, ours in kept.items() if theirs not in dataset.column_names and ours != "image_id"]
    if missing:
        raise DataError(
            f"'{source.title}' has no column '{missing[0]}' (it has {', '.join(dataset.column_names)}); correct "
            "column_mapping."
        )
    dataset = dataset.select_columns([theirs for theirs in kept if theirs in dataset.column_names])
    renamed = {
        theirs: ours for ours, theirs in source.mapped_columns.items() if theirs != ours and ours in kept.values()
    }
    return disable_image_decoding(dataset.rename_columns(renamed))


def _innermost(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error)
