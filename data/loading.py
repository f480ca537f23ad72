"""From the source a recipe names to a data set with the columns of its kind."""

import os
import re
from collections import Counter
from collections.abc import Callable, Collection
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from bifocal.data.beir import is_beir, read_beir, read_nli
from bifocal.data.columns import MissingColumnError, require_columns
from bifocal.data.delimited import header_of, read_csv
from bifocal.data.filters import RowFilter
from bifocal.data.image_decoding import disable_image_decoding
from bifocal.data.kinds import KINDS
from bifocal.data.normalize import LAYOUTS, Layout, Normaliser, as_is, dpr, layout_of
from bifocal.data.paths import Fence, LoadedFence, expand, is_remote
from bifocal.data.readers import PICTURES, READERS, format_of, read_pictures
from bifocal.data.shards import ShardStream
from bifocal.data.skips import Fault, Skipped
from bifocal.data.source import Source
from bifocal.data.tables import checked, materialise
from bifocal.data.tar import read_tar
from bifocal.data.text_files import FileFault, Reader
from bifocal.errors import DataError

_PEEKED = 20  # rows that are looked at to know a file's columns
_LOOKED = 20  # files that are looked at to find one with rows
_TEXT_TABLES = ("csv", "tsv", "json", "jsonl")
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")


def load_source(
    source: Source | str, kind: str, seed: int = 0, skipped: Skipped | None = None, name: str | None = None
) -> Any:
    """
    Args:
        source: where rows come from, or only its path.
        kind: of the rows wanted: image-text, text-pair, text-triplet, text-only or image-only.
        seed: of the order of files in a stream, and of the data sets that are made, not read.
        skipped: counts and names the rows that are left out.
        name: of the task; the source's path when None.

    Returns:
        A `datasets.Dataset`, or with `streaming` a `ShardStream` (files) or an `IterableDataset` (the Hub). Pictures
        stay undecoded.

    Raises:
        DataError: nothing at the path, no such column, or a filter that a stream cannot have.
        BadRowsError: more bad rows than `max_bad`.
    """
    source = _named(Source(path=source) if isinstance(source, str) else source)
    skipped = Skipped() if skipped is None else skipped
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
        return stream if source.streaming else materialise(stream, source, skipped, name)
    found = disable_image_decoding(_from_hub(source))
    require_columns(found.column_names, source, kind)
    path = os.path.expanduser(source.path) if isinstance(source.path, str) else ""
    fence = LoadedFence(path if os.path.isdir(path) else None)
    return checked(found, source, normaliser(source, kind, fence), skipped, name)


def open_stream(source: Source, kind: str, seed: int | None = None) -> ShardStream | None:
    """A source of files as a stream, whether it is to be streamed or not; None for a data set of the Hub.

    Raises:
        DataError: there is nothing at the path, or nothing that is known.
    """
    source = _named(source)
    found = _locate(source, kind)
    if found is None:
        return None
    shards, read, layout, root = found
    fence = Fence(source.images if source.images is not None else root)
    return ShardStream(shards, read, normaliser(source, kind, fence, layout), kind, seed)


def normaliser(source: Source, kind: str, fence: Fence, layout: Layout = as_is) -> Callable[[str, Any], dict[str, Any]]:
    """From a row of a source to a row of a kind, filters included."""
    steps = Normaliser(kind, source.columns, fence, source.negatives)
    layout = partial(dpr, negatives=source.negatives) if layout is dpr else layout
    return _Steps(layout, steps, RowFilter(source.clean) if source.clean is not None else None)


class _Steps:
    """Layout, normalisation, filter; an object and no closure, since data workers receive it."""

    def __init__(self, layout: Layout, steps: Normaliser, keep: RowFilter | None) -> None:
        self.layout, self.steps, self.keep = layout, steps, keep

    def __call__(self, name: str, raw: Any) -> dict[str, Any]:
        row = self.steps(name, self.layout(raw))
        return row if self.keep is None else self.keep(row)


Located = tuple[list[str], Reader, Layout, str | None]


def _locate(source: Source, kind: str) -> Located | None:
    """Files, their reader and layout, and the folder of their pictures; None for what `datasets` is to load."""
    paths = [source.path] if isinstance(source.path, str) else source.path
    if source.format == "hub":
        return None
    if len(paths) == 1 and os.path.isdir(os.path.expanduser(paths[0])):
        return _in_folder(os.path.expanduser(paths[0]), source, kind)
    if not any(_is_files(path) for path in paths):
        return None
    shards = expand(paths)
    if not shards or (len(shards) == 1 and not is_remote(shards[0]) and not os.path.exists(shards[0])):
        raise DataError(f"There is nothing at '{source.title}'; check the path.")
    return _files(shards, source, kind, None if is_remote(shards[0]) else os.path.dirname(shards[0]) or ".")


def _is_files(path: str) -> bool:
    """Whether a path means files; if not, it is an id on the Hub."""
    local = os.path.isabs(path) or path.startswith((".", "~")) or path.count("/") > 1 or os.path.isfile(path)
    return is_remote(path) or local or format_of(path) is not None or any(sign in path for sign in "*?[{")


def _in_folder(folder: str, source: Source, kind: str) -> Located | None:
    if is_beir(folder):
        return [folder], partial(read_beir, split=source.split), as_is, None
    for place in (folder, os.path.join(folder, source.split)):
        for name in METADATA:
            path = os.path.join(place, name)
            if os.path.exists(path):
                return _files([path], source, kind, place)
    tars = sorted(map(str, Path(folder).glob("*.tar")))
    if tars:
        return _files(tars, source, kind, folder)
    if os.path.exists(os.path.join(folder, "state.json")):  # Dataset.save_to_disk
        return _files(sorted(map(str, Path(folder).glob("data-*.arrow"))), source, kind, folder)
    if not any(files for _, _, files in os.walk(folder)):
        raise DataError(f"'{folder}' is an empty folder.")
    if kind == "image-only":
        return [folder], read_pictures, as_is, folder
    tables = _text_tables(folder, source)
    return _files(tables, source, kind, folder) if tables else None


def _text_tables(folder: str, source: Source) -> list[str]:
    """Return the CSV, TSV or JSON files of a split, as `datasets` finds them; none if it finds others.

    They are read here, since its own reader of CSV takes the lines after a quote that never closes for one field.

    Raises:
        DataError: if there are such files, but none of this split.
    """
    from datasets import load_dataset_builder

    if not _holds(folder, _TEXT_TABLES):
        return []
    try:
        config = load_dataset_builder(folder, source.name).config
    except Exception:  # said when the folder is loaded
        return []
    files = {str(split): list(map(str, found)) for split, found in (config.data_files or {}).items()}
    found = files.get(source.split, [])
    if not found and files:
        raise DataError(f"'{folder}' has no split '{source.split}' (it has {', '.join(files)}); set split.")
    return found if all(format_of(path) in _TEXT_TABLES for path in found) else []


def _holds(folder: str, formats: Collection[str]) -> bool:
    return any(format_of(name) in formats for _, _, files in os.walk(folder) for name in files)


def _files(shards: list[str], source: Source, kind: str, root: str | None) -> Located:
    form = source.format or format_of(shards[0])
    table = format_of(shards[0]) if form in (*LAYOUTS, "nli") else "tsv" if form == "msmarco" else form
    if table not in (*READERS, "webdataset"):
        known = ", ".join(["tar", *READERS])
        raise DataError(
            f"'{shards[0]}' is of no format that is known by its name ({known}); name one with format, or convert it."
        )
    read = _reader(str(table), source, kind)
    # A remote tar shard would be fetched as a whole.
    rows = [] if table == "webdataset" and is_remote(shards[0]) else _first_rows(shards, read)
    if form in ("webdataset", "msmarco"):
        return shards, read, as_is, None
    names: dict[str, Any] = {}
    for row in rows:
        names = {**row, **names}
    layout = form if form in (*LAYOUTS, "nli") else layout_of(names)
    if layout == "nli" and kind in ("text-pair", "text-triplet"):
        return shards, partial(read_nli, triplets=kind == "text-triplet", read=read), as_is, None
    if layout not in LAYOUTS and names:
        require_columns(list(names), source, kind, rows)
    return shards, read, LAYOUTS.get(layout or "", as_is), root


def _reader(table: str, source: Source, kind: str) -> Reader:
    """The reader of a format, with what the source says of it.

    Raises:
        DataError: if it says what the format does not have.
    """
    keys = {"csv": ("delimiter", "quoting", "encoding"), "tsv": ("delimiter", "quoting", "encoding")}
    allowed = {**keys, "json": ("encoding",), "jsonl": ("encoding",)}.get(table, ())
    given = {key: getattr(source, key) for key in keys["csv"] if getattr(source, key) is not None}
    for key in given:
        if key not in allowed:
            files = "CSV, TSV, JSON and JSONL" if key == "encoding" else "CSV and TSV"
            raise DataError(f"'{source.title}' is read as {table}, but {key} is for {files} files; remove it.")
    if table in ("csv", "tsv"):
        header = tuple(source.header or (("query", "positive", "negative") if source.format == "msmarco" else ()))
        return partial(read_csv, header=header, tabs=table == "tsv", **given)
    if table in ("parquet", "arrow"):
        return partial(READERS[table], labels=kind != "scored-pair")  # type: ignore[call-arg]
    return read_tar if table == "webdataset" else partial(READERS[table], **given)


def _first_rows(shards: list[str], read: Reader) -> list[dict[str, Any]]:
    """Return some rows of the first file that has any; none if they cannot be read, which is said when its turn comes.

    Raises:
        DataError: if this file cannot be read as its source says, or no file has rows.
    """
    unread = len(shards) > _LOOKED
    for shard in shards[:_LOOKED]:
        found: list[dict[str, Any]] = []
        seen = 0
        try:
            for _, row in zip(range(_PEEKED), read(shard, None), strict=False):
                seen += 1
                if not isinstance(row.value, Fault):
                    found.append(row.value)
        except FileFault as fault:
            raise DataError(f"'{shard}' cannot be read ({fault.cause}): {fault.detail}.") from fault
        except Exception:
            unread = True
            continue
        if seen and not _is_empty(shard):
            return found
    if unread:
        return []
    more = f", nor have the {len(shards) - 1} files after it" if len(shards) > 1 else ""
    raise DataError(f"{_empty(shards[0], read)}{more}.")


def _is_empty(shard: str) -> bool:
    return not is_remote(shard) and os.path.isfile(shard) and os.path.getsize(shard) == 0


def _empty(shard: str, read: Reader) -> str:
    """What there is in a file without rows."""
    if _is_empty(shard):
        return f"'{shard}' is empty (0 bytes) and has no rows"
    names = header_of(shard, **read.keywords) if isinstance(read, partial) and read.func is read_csv else []
    return f"'{shard}' has a header ({', '.join(names)}), but no rows" if names else f"'{shard}' has no rows"


def guess_kind(source: Source) -> str:
    """The kind of rows that a source is made for, by its layout and columns.

    Raises:
        DataError: if there is no such source, or its columns fit no kind.
    """
    source = _named(source)
    paths = [source.path] if isinstance(source.path, str) else source.path
    folder = os.path.expanduser(paths[0])
    if os.path.isdir(folder) and is_beir(folder):
        return "text-pair"
    kinds = ("text-triplet", "image-text", "text-pair", "text-only")
    names: list[str] | None = None
    problems: list[tuple[str, Fault]] = []
    for kind in kinds:
        try:
            found = open_stream(source, kind)
        except MissingColumnError as error:
            names = error.names
            continue
        if found is None:  # for `datasets`, which tells the columns without reading all rows
            names = _columns_elsewhere(source)
            fitting = [kind for kind in kinds if names and _has_columns(names, source, kind)]
            if fitting:
                return fitting[0]
            break
        rows = list(islice(found.rows(), _PEEKED))
        if not all(isinstance(row, Fault) for _, row in rows):
            return kind
        problems += [(name, row) for name, row in rows[:1] if isinstance(row, Fault)]
    if names and not problems:
        raise DataError(
            f"Cannot infer the kind of rows of '{source.title}' from its columns ({', '.join(names[:20])}). Name it "
            "with --kind, and the columns with columns.OURS=THEIRS, such as columns.query=title."
        )
    # Of a kind that it is not, its rows lack a column.
    told = next((one for one in problems if not one[1].cause.startswith("no ")), problems[0] if problems else None)
    said = f"; none of the first can be used ({told[0]}: {told[1]})" if told is not None else ""
    raise DataError(f"Cannot infer the kind of rows of '{source.title}'{said}. Name it with --kind.")


def _columns_elsewhere(source: Source) -> list[str] | None:
    folder = os.path.expanduser(source.path) if isinstance(source.path, str) else ""
    if os.path.isdir(folder) and not _holds(folder, (*READERS, "webdataset")):
        raise DataError(f"{_not_loaded(source.title, folder)}.")
    return _from_hub(source.model_copy(update={"streaming": True})).column_names


def _has_columns(names: list[str], source: Source, kind: str) -> bool:
    try:
        require_columns(names, source, kind)
    except MissingColumnError:
        return False
    return True


def _named(source: Source) -> Source:
    """The source that `corpus:NAME` stands for."""
    if not isinstance(source.path, str) or not source.path.startswith("corpus:"):
        return source
    from bifocal.data.corpora import corpus

    return corpus(source.path.removeprefix("corpus:")).source(source)


def _require_streamable(source: Source) -> None:
    if source.clean is not None and source.clean.needs_whole:
        raise DataError(
            f"'{source.title}' streams, but to find duplicates or inconsistent pairs all rows must be compared; clean "
            "it first with bifocal data clean, or do not stream it."
        )
    if source.limit is not None and _is_files_source(source):
        raise DataError(f"'{source.title}' streams, where limit cannot count rows; name fewer files, or do not stream.")


def _is_files_source(source: Source) -> bool:
    paths = [source.path] if isinstance(source.path, str) else source.path
    return any(_is_files(path) or os.path.exists(path) for path in paths)


def _from_hub(source: Source) -> Any:
    from datasets import load_dataset

    options: dict[str, Any] = dict(split=source.split, streaming=source.streaming)
    path = source.path if isinstance(source.path, str) else None
    if path is None:
        raise DataError(f"'{source.title}': a list of paths takes files, and no ids of the Hub.")
    folder = os.path.expanduser(path)
    try:
        found = load_dataset(folder, source.name, **options)
    except Exception as error:
        raise DataError(f"{_not_loaded(path, folder)} ({_innermost(error)}).") from error
    return found.take(source.limit) if source.limit is not None else found


def _not_loaded(path: str, folder: str) -> str:
    if os.path.isdir(folder):
        return f"'{path}' is a folder in which no rows can be found{_held(folder)}"
    if os.path.exists(folder):
        return f"'{path}' is a file of no known format; name it with format"
    if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path):
        return f"There is no file or folder '{path}', and no data set of this name could be loaded from the Hub"
    return f"There is nothing at '{path}'; check the path"


def _held(folder: str) -> str:
    """What a folder holds, in a few words, and what it lacks if these are images."""
    endings = Counter(name.rpartition(".")[2].lower() for _, _, files in os.walk(folder) for name in files)
    images = sum(count for ending, count in endings.items() if ending in PICTURES)
    if images:
        return f"; it holds {images:,} images, but no metadata.jsonl or metadata.csv with their captions"
    return f"; it holds {', '.join(f'{count:,} .{ending}' for ending, count in endings.most_common(4))}"


def with_columns(found: Any, source: Source, columns: tuple[str, ...]) -> Any:
    """A data set that is known to be whole, its first `limit` rows, with our names of the columns a task needs."""
    if source.limit is not None:
        found = found.take(source.limit)
    kept = {source.columns.get(ours, ours): ours for ours in (*columns, "image_id")}
    missing = [theirs for theirs, ours in kept.items() if theirs not in found.column_names and ours != "image_id"]
    if missing:
        raise DataError(
            f"'{source.title}' has no column '{missing[0]}' (it has {', '.join(found.column_names)}); correct columns."
        )
    found = found.select_columns([theirs for theirs in kept if theirs in found.column_names])
    renamed = {theirs: ours for ours, theirs in source.columns.items() if theirs != ours and ours in kept.values()}
    return disable_image_decoding(found.rename_columns(renamed))


def _innermost(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
