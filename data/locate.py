"""The files of a source, with their reader and column layout."""

import hashlib
import os
import pickle
import re
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import PrivateAttr

from bifocal.data.beir import is_beir, read_beir
from bifocal.data.columns import require_columns
from bifocal.data.delimited import header_of, read_csv
from bifocal.data.nli import read_nli
from bifocal.data.normalize import COLUMN_LAYOUTS, ColumnLayout, as_is, detect_layout
from bifocal.data.paths import expand, is_remote
from bifocal.data.readers import READERS, format_of, read_image_folder
from bifocal.data.skips import RowError
from bifocal.data.source import Source
from bifocal.data.tar import read_tar
from bifocal.data.text_files import FileError, Reader, file_name
from bifocal.errors import DataError

_PEEKED_ROWS = 20  # rows read to learn a file's columns
_PEEKED_FILES = 20  # files opened to find one with rows
_TEXT_TABLES = ("csv", "tsv", "json", "jsonl")
METADATA_FILES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")


class SourceFiles(NamedTuple):
    """The files of a source.

    Args:
        paths: the files, or one folder that is read as a whole.
        read: their reader.
        layout: their column layout.
        root: folder that relative image paths start from; None if no image may be named by a path.
        own_folders: whether they start from the folder of their file instead, since the files lie in several.
    """

    paths: list[str]
    read: Reader
    layout: ColumnLayout
    root: str | None
    own_folders: bool = False

    @property
    def ambiguous(self) -> bool:
        """Return whether two files have the same name, so that rows are named by the whole path."""
        return len(set(map(file_name, self.paths))) < len(self.paths)


class SourceSplit(Source):
    """One file of a source, read as a part of the whole: with the same columns, image folder and names of rows.

    Args:
        whole: digest of what it takes over from the whole source, by which caches tell it from the file alone.
    """

    whole: str
    _files: SourceFiles = PrivateAttr()
    _ambiguous: bool = PrivateAttr()
    _folder: str | None = PrivateAttr()

    @classmethod
    def all_of(cls, source: Source, files: SourceFiles) -> list["SourceSplit"]:
        """Return the splits of a source, one for each of its files."""
        ambiguous, folder = files.ambiguous, name_folder(source)
        facts = pickle.dumps((files._replace(paths=[]), ambiguous))
        digest = hashlib.blake2b(facts, digest_size=8).hexdigest()
        splits = []
        for path in files.paths:
            split = cls.model_construct(**{**dict(source), "path": path, "whole": digest})
            split._files, split._ambiguous, split._folder = files._replace(paths=[path]), ambiguous, folder
            splits.append(split)
        return splits

    @property
    def files(self) -> SourceFiles:
        return self._files

    @property
    def folder(self) -> str | None:
        """The folder that names of the source's images are relative to, see `name_folder`."""
        return self._folder

    @property
    def ambiguous(self) -> bool:
        """Return whether another file of the source has the same name."""
        return self._ambiguous


def name_folder(source: Source) -> str | None:
    """Return the folder that names of a source's images are relative to; None if it is not local.

    It is the folder before a pattern, which is the same whatever files match, and the innermost one of several paths.
    """
    if isinstance(source, SourceSplit):
        return source.folder
    paths = [source.path] if isinstance(source.path, str) else source.path
    if any(map(is_remote, paths)):
        return None
    before = [re.split(r"[*?\[{]", os.path.expanduser(path))[0] for path in paths]
    try:
        return os.path.commonpath([os.path.abspath(os.path.dirname(path)) for path in before])
    except ValueError:  # on different drives
        return None


def locate(source: Source, kind: str) -> SourceFiles | None:
    """Return the files of a source; None if `datasets` has to load it.

    Raises:
        DataError: if there is nothing at the path, or its format is unknown.
    """
    if isinstance(source, SourceSplit):
        return source.files
    paths = [source.path] if isinstance(source.path, str) else source.path
    if source.format == "hub":
        return None
    if len(paths) == 1 and os.path.isdir(os.path.expanduser(paths[0])):
        return _locate_in_folder(os.path.expanduser(paths[0]), source, kind)
    if not any(is_files(path) for path in paths):
        return None
    shards = expand(paths)
    if not shards or (len(shards) == 1 and not is_remote(shards[0]) and not os.path.exists(shards[0])):
        raise DataError(f"There is nothing at '{source.title}'; check the path.")
    if is_remote(shards[0]):
        return _locate_files(shards, source, kind, None)
    files = _locate_files(shards, source, kind, os.path.dirname(shards[0]) or ".")
    return files._replace(own_folders=files.root is not None and len(set(map(os.path.dirname, shards))) > 1)


def is_files(path: str) -> bool:
    """Return whether a path means files; if not, it is a Hub id."""
    local = os.path.isabs(path) or path.startswith((".", "~")) or path.count("/") > 1 or os.path.isfile(path)
    return is_remote(path) or local or format_of(path) is not None or any(sign in path for sign in "*?[{")


def _locate_in_folder(folder: str, source: Source, kind: str) -> SourceFiles | None:
    if is_beir(folder):
        return SourceFiles([folder], partial(read_beir, split=source.split), as_is, None)
    for base in (folder, os.path.join(folder, source.split)):
        for name in METADATA_FILES:
            path = os.path.join(base, name)
            if os.path.exists(path):
                return _locate_files([path], source, kind, base)
    tars = sorted(map(str, Path(folder).glob("*.tar")))
    if tars:
        return _locate_files(tars, source, kind, folder)
    if os.path.exists(os.path.join(folder, "state.json")):  # Dataset.save_to_disk
        return _locate_files(sorted(map(str, Path(folder).glob("data-*.arrow"))), source, kind, folder)
    if not any(files for _, _, files in os.walk(folder)):
        raise DataError(f"'{folder}' is an empty folder.")
    if kind == "image-only":
        return SourceFiles([folder], read_image_folder, as_is, folder)
    tables = _text_tables(folder, source)
    return _locate_files(tables, source, kind, folder) if tables else None


def _text_tables(folder: str, source: Source) -> list[str]:
    """Return the CSV, TSV or JSON files of a split as `datasets` finds them; an empty list if it finds others.

    They are read here, since the reader of `datasets` turns all lines after an unclosed quote into one field.

    Raises:
        DataError: if there are such files, but none of this split.
    """
    from datasets import load_dataset_builder

    if not holds_files(folder, _TEXT_TABLES):
        return []
    try:
        config = load_dataset_builder(folder, source.name).config
    except Exception:  # reported when the folder is loaded
        return []
    files = {str(split): list(map(str, paths)) for split, paths in (config.data_files or {}).items()}
    paths = files.get(source.split, [])
    if not paths and files:
        raise DataError(f"'{folder}' has no split '{source.split}' (it has {', '.join(files)}); set split.")
    return paths if all(format_of(path) in _TEXT_TABLES for path in paths) else []


def holds_files(folder: str, formats: Collection[str]) -> bool:
    """Return whether a folder or its subfolders have a file of one of these formats."""
    return any(format_of(name) in formats for _, _, files in os.walk(folder) for name in files)


def _locate_files(shards: list[str], source: Source, kind: str, root: str | None) -> SourceFiles:
    form = source.format or format_of(shards[0])
    table = format_of(shards[0]) if form in (*COLUMN_LAYOUTS, "nli") else "tsv" if form == "msmarco" else form
    if table not in (*READERS, "webdataset"):
        known = ", ".join(["tar", *READERS])
        raise DataError(
            f"'{shards[0]}' has an unknown format (known by name: {known}). Set format, or convert the file."
        )
    read = _reader(str(table), source, kind)
    # A remote tar shard would be fetched as a whole.
    rows = [] if table == "webdataset" and is_remote(shards[0]) else _first_rows(shards, read)
    if form in ("webdataset", "msmarco"):
        return SourceFiles(shards, read, as_is, None)
    names: dict[str, Any] = {}
    for row in rows:
        names = {**row, **names}
    layout = form if form in (*COLUMN_LAYOUTS, "nli") else detect_layout(names)
    if layout == "nli" and kind in ("text-pair", "text-triplet"):
        return SourceFiles(shards, partial(read_nli, triplets=kind == "text-triplet", read=read), as_is, None)
    if layout not in COLUMN_LAYOUTS and names:
        require_columns(list(names), source, kind, rows)
    return SourceFiles(shards, read, COLUMN_LAYOUTS.get(layout or "", as_is), root)


def _reader(table: str, source: Source, kind: str) -> Reader:
    """Return the reader of a format, with the options that the source sets.

    Raises:
        DataError: if the format does not have one of these options.
    """
    keys = {"csv": ("delimiter", "quoting", "encoding"), "tsv": ("delimiter", "quoting", "encoding")}
    allowed = {**keys, "json": ("encoding",), "jsonl": ("encoding",)}.get(table, ())
    options = {key: getattr(source, key) for key in keys["csv"] if getattr(source, key) is not None}
    for key in options:
        if key not in allowed:
            files = "CSV, TSV, JSON and JSONL" if key == "encoding" else "CSV and TSV"
            raise DataError(f"'{source.title}' is read as {table}, but {key} is for {files} files; remove it.")
    if table in ("csv", "tsv"):
        column_names = tuple(
            source.column_names or (("query", "positive", "negative") if source.format == "msmarco" else ())
        )
        return partial(read_csv, column_names=column_names, tabs=table == "tsv", **options)
    if table in ("parquet", "arrow"):
        return partial(READERS[table], labels=kind != "scored-pair")  # type: ignore[call-arg]
    return read_tar if table == "webdataset" else partial(READERS[table], **options)


def _first_rows(shards: list[str], read: Reader) -> list[dict[str, Any]]:
    """Return some rows of the first file that has any; an empty list if no file can be read, which is reported later.

    Raises:
        DataError: if this file cannot be read with the source's options, or no file has rows.
    """
    unread = len(shards) > _PEEKED_FILES
    for shard in shards[:_PEEKED_FILES]:
        rows: list[dict[str, Any]] = []
        seen = 0
        try:
            for _, row in zip(range(_PEEKED_ROWS), read(shard, None), strict=False):
                seen += 1
                if not isinstance(row.value, RowError):
                    rows.append(row.value)
        except FileError as error:
            raise DataError(f"'{shard}' cannot be read ({error.cause}): {error.detail}.") from error
        except Exception:
            unread = True
            continue
        if seen and not _is_empty(shard):
            return rows
    if unread:
        return []
    more = f", and the {len(shards) - 1} files after it have none either" if len(shards) > 1 else ""
    raise DataError(f"{_empty(shards[0], read)}{more}.")


def _is_empty(shard: str) -> bool:
    return not is_remote(shard) and os.path.isfile(shard) and os.path.getsize(shard) == 0


def _empty(shard: str, read: Reader) -> str:
    """Return what a file without rows holds, as a sentence."""
    if _is_empty(shard):
        return f"'{shard}' is empty (0 bytes) and has no rows"
    names = header_of(shard, **read.keywords) if isinstance(read, partial) and read.func is read_csv else []
    return f"'{shard}' has a header ({', '.join(names)}), but no rows" if names else f"'{shard}' has no rows"
