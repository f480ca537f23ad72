"""From the source a recipe names to a data set with the columns of its kind."""

import os
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from bifocal.training.data.cleaning import RowFilter
from bifocal.training.data.faults import Fault, Skipped
from bifocal.training.data.files import READERS, Reader, format_of, read_csv, read_pictures
from bifocal.training.data.groups import is_beir, read_beir, read_nli
from bifocal.training.data.places import Fence, LoadedFence, expand, is_remote
from bifocal.training.data.rows import LAYOUTS, Layout, Normaliser, as_is, dpr, has_column, layout_of
from bifocal.training.data.shards import ShardStream
from bifocal.training.data.tables import checked, materialise
from bifocal.training.data.tars import read_tar
from bifocal.training.recipe import RecipeError, Source
from bifocal.training.task_data import disable_image_decoding
from bifocal.training.tasks import KINDS

_PEEKED = 20  # rows that are looked at to know a file's columns
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")


class MissingColumnError(RecipeError):
    """A source lacks a column."""


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
        RecipeError: nothing at the path, no such column, or a filter that a stream cannot have.
        BadRowsError: more bad rows than `max_bad`.
    """
    source = _named(Source(path=source) if isinstance(source, str) else source)
    skipped = Skipped() if skipped is None else skipped
    name = name or source.title
    if source.path == "symbols":
        from bifocal.training.data.symbols import SymbolsConfig, build_symbols

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
        RecipeError: there is nothing at the path, or nothing that is known.
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
        raise RecipeError(f"There is nothing at '{source.title}'; check the path.")
    return _files(shards, source, kind, None if is_remote(shards[0]) else os.path.dirname(shards[0]) or ".")


def _is_files(path: str) -> bool:
    """Whether a path means files; if not, it is an id on the Hub."""
    local = os.path.isabs(path) or path.startswith((".", "~")) or path.count("/") > 1
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
        return tars, read_tar, as_is, None
    if os.path.exists(os.path.join(folder, "state.json")):  # Dataset.save_to_disk
        return _files(sorted(map(str, Path(folder).glob("data-*.arrow"))), source, kind, folder)
    if kind == "image-only":
        return [folder], read_pictures, as_is, folder
    return None


def _files(shards: list[str], source: Source, kind: str, root: str | None) -> Located:
    form = source.format or format_of(shards[0])
    if form == "webdataset":
        return shards, read_tar, as_is, None
    if form == "msmarco":
        return shards, partial(read_csv, header=("query", "positive", "negative"), quotes=False), as_is, None
    table = format_of(shards[0]) if form in (*LAYOUTS, "nli") else form
    if table not in READERS:
        known = ", ".join(["tar", *READERS])
        raise RecipeError(
            f"'{shards[0]}' is of no format that is known by its name ({known}); name one with format, or convert it."
        )
    read = partial(read_csv, header=tuple(source.header)) if source.header else READERS[table]
    names = _first_columns(shards, read)
    layout = form if form in (*LAYOUTS, "nli") else layout_of(names)
    if layout == "nli" and kind in ("text-pair", "text-triplet"):
        return shards, partial(read_nli, triplets=kind == "text-triplet"), as_is, None
    if layout not in LAYOUTS and names:
        require_columns(list(names), source, kind)
    return shards, read, LAYOUTS.get(layout or "", as_is), root


def _first_columns(shards: list[str], read: Reader) -> dict[str, Any]:
    """The columns of the first rows of the first file, with a value of each; none where they cannot be read."""
    found: dict[str, Any] = {}
    try:
        for _, row in zip(range(_PEEKED), read(shards[0], None), strict=False):
            if not isinstance(row.value, Fault):
                found = {**row.value, **found}
    except Exception:  # said when the file's turn comes
        return found
    return found


def guess_kind(source: Source) -> str:
    """The kind of rows that a source is made for, by its layout and columns.

    Raises:
        RecipeError: they fit none, or cannot be looked at without loading the source.
    """
    source = _named(source)
    paths = [source.path] if isinstance(source.path, str) else source.path
    folder = os.path.expanduser(paths[0])
    if os.path.isdir(folder) and is_beir(folder):
        return "text-pair"
    for kind in ("text-triplet", "image-text", "text-pair", "text-only"):
        try:
            found = open_stream(source, kind)
        except MissingColumnError:
            continue
        if found is None:
            break
        if not all(isinstance(row, Fault) for _, row in islice(found.rows(), _PEEKED)):
            return kind
    raise RecipeError(f"The kind of rows of '{source.title}' cannot be told by its columns; name it with --kind.")


def _named(source: Source) -> Source:
    """The source that `corpus:NAME` stands for."""
    if not isinstance(source.path, str) or not source.path.startswith("corpus:"):
        return source
    from bifocal.training.data.corpora import corpus

    return corpus(source.path.removeprefix("corpus:")).source(source)


def _require_streamable(source: Source) -> None:
    if source.clean is not None and source.clean.needs_whole:
        raise RecipeError(
            f"'{source.title}' streams, but to find duplicates or inconsistent pairs all rows must be compared; clean "
            "it first with bifocal data clean, or do not stream it."
        )
    if source.limit is not None and _is_files_source(source):
        raise RecipeError(
            f"'{source.title}' streams, where limit cannot count rows; name fewer files, or do not stream."
        )


def _is_files_source(source: Source) -> bool:
    paths = [source.path] if isinstance(source.path, str) else source.path
    return any(_is_files(path) or os.path.exists(path) for path in paths)


def _from_hub(source: Source) -> Any:
    from datasets import load_dataset

    options: dict[str, Any] = dict(split=source.split, streaming=source.streaming)
    path = source.path if isinstance(source.path, str) else None
    if path is None:
        raise RecipeError(f"'{source.title}': a list of paths takes files, and no ids of the Hub.")
    try:
        found = load_dataset(os.path.expanduser(path), source.name, **options)
    except Exception as error:
        raise RecipeError(
            f"'{path}' is no file or folder that can be read here, and could not be loaded from the Hub "
            f"({_innermost(error)})."
        ) from error
    return found.take(source.limit) if source.limit is not None else found


def require_columns(names: list[str] | None, source: Source, kind: str) -> None:
    """
    Raises:
        MissingColumnError: a source with columns of these names lacks one that is named, or that the kind needs.
    """
    if names is None:  # a stream that does not know them before it is read
        return
    for ours, theirs in source.columns.items():
        if theirs not in names and theirs.partition(".")[0] not in names:
            raise MissingColumnError(
                f"'{source.title}' has no column '{theirs}' (it has {', '.join(names)}); mend columns.{ours}."
            )
    for ours in KINDS[kind]:
        if ours not in source.columns and not has_column(ours, names):
            raise MissingColumnError(
                f"'{source.title}' has no column '{ours}' (it has {', '.join(names)}); name the right one under "
                f"columns, such as {ours}: {names[0]}."
            )


def with_columns(found: Any, source: Source, columns: tuple[str, ...]) -> Any:
    """A data set that is known to be whole, its first `limit` rows, with our names of the columns a task needs."""
    if source.limit is not None:
        found = found.take(source.limit)
    kept = {source.columns.get(ours, ours): ours for ours in (*columns, "image_id")}
    missing = [theirs for theirs, ours in kept.items() if theirs not in found.column_names and ours != "image_id"]
    if missing:
        raise RecipeError(
            f"'{source.title}' has no column '{missing[0]}' (it has {', '.join(found.column_names)}); mend columns."
        )
    found = found.select_columns([theirs for theirs in kept if theirs in found.column_names])
    renamed = {theirs: ours for ours, theirs in source.columns.items() if theirs != ours and ours in kept.values()}
    return disable_image_decoding(found.rename_columns(renamed))


def _innermost(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
