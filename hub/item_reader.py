"""Reading a source as items: images with their captions, or texts, each with a name."""

import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bifocal.data.filters import Cleaning, DuplicateFilter, RowFilter
from bifocal.data.image_files import FoundImages, by_suffix, find_images, image_suffixes, printable
from bifocal.data.kinds import INDEXED
from bifocal.data.loading import infer_kind as infer_row_kind
from bifocal.data.loading import iter_rows
from bifocal.data.locate import METADATA_FILES, name_folder
from bifocal.data.paths import AllowedRoots, expand, is_remote
from bifocal.data.skips import RowError
from bifocal.data.source import Source
from bifocal.embedding.items import Item
from bifocal.errors import DataError
from bifocal.hub.search.captions import caption_name
from bifocal.hub.search.index import SearchIndex
from bifocal.hub.search.sync import ItemSource
from bifocal.hub.search.table import join_captions

IMAGE_KINDS = ("image-text", "image-only")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def infer_kind(source: Source, kind: str | None = None) -> str:
    """Return the kind of rows to read, inferred from files and columns if it is None.

    Raises:
        DataError: if the kind cannot be indexed or inferred, or there is nothing to read.
    """
    if kind is not None and kind not in INDEXED:
        raise DataError(f"'{kind}' cannot be indexed. Choose --kind from {', '.join(INDEXED)}.")
    folder = _folder(source)
    if isinstance(source.path, str) and folder is None:
        _require_rows(source.path, kind)
    if folder is not None and not os.listdir(folder):
        raise DataError(f"The folder '{source.title}' is empty. Nothing can be indexed.")
    if kind is not None:
        return kind
    if image_files(source) is not None:
        return "image-only"
    try:
        kind = infer_row_kind(source)
    except DataError:
        if folder is None:
            raise
        files = find_images(folder)
        if files.names:
            return "image-only"
        contents = by_suffix(files.others) or f"{files.hidden} hidden files or folders"
        raise DataError(
            f"The folder '{source.title}' holds no images and no table of them ({contents}). If it is a saved data "
            "set, pass --kind."
        ) from None
    return "text-pair" if kind == "text-triplet" else kind


def image_files(source: Source) -> tuple[str, list[str]] | None:
    """Return folder and names of the images that a path or pattern matches; None if it matches anything else."""
    if not isinstance(source.path, str) or is_remote(source.path) or _folder(source) is not None:
        return None
    files = expand(source.path)
    if not files or any(os.path.splitext(file)[1].lower()[1:] not in image_suffixes() for file in files):
        return None
    # The path before the pattern, which is the same whatever files match.
    root = os.path.dirname(re.split(r"[*?\[{]", os.path.expanduser(source.path))[0]) or "."
    return root, [os.path.relpath(file, root).replace(os.sep, "/") for file in files]


def _folder(source: Source) -> str | None:
    path = os.path.expanduser(source.path) if isinstance(source.path, str) else ""
    return path if os.path.isdir(path) else None


def _require_rows(path: str, kind: str | None) -> None:
    """Raise an error if `path` means a file that is missing or empty.

    Raises:
        DataError: if a path that means a file has no file, or an empty one.
    """
    file = os.path.expanduser(path)
    if os.path.isfile(file):
        if os.path.getsize(file) == 0:
            raise DataError(f"The file '{path}' is empty. Nothing can be indexed.")
    elif not is_remote(path) and not any(sign in path for sign in "*?[{:") and path != "symbols":
        if not _HUB_ID.fullmatch(path) or path.startswith(".") or os.path.splitext(path)[1]:
            raise DataError(f"'{path}' does not exist. Check the path.")
        if kind is None:
            raise DataError(f"There is no file or folder '{path}'. If it is a data set on the Hub, pass --kind.")


def _table_of(folder: str, split: str) -> str | None:
    """Return the table of a folder's images; None if it has none."""
    paths = (os.path.join(folder, inner, name) for inner in ("", split) for name in METADATA_FILES)
    return next(filter(os.path.exists, paths), None)


@dataclass
class ItemReader:
    """Reads the items of a source once, and counts what it skips.

    Args:
        source: source to read.
        kind: kind of its rows.
        captions: whether captions are items as well.
        exclude: folders that are not read, such as the index itself.
        skipped: filled with name and reason of rows and files that cannot be read.
        other_files: filled with the files of a folder that are not images, counted by suffix.
        hidden_files: set to the number of hidden files and folders.
        images_without_row: set to the number of images that the folder's table does not name.
        is_cut: set to whether a file is missing or was not read to its end.
    """

    source: Source
    kind: str
    captions: bool = False
    exclude: tuple[Path, ...] = ()
    skipped: list[tuple[str, str]] = field(default_factory=list)
    other_files: Counter[str] = field(default_factory=Counter)
    hidden_files: int = 0
    images_without_row: int = 0
    is_cut: bool = False

    def __post_init__(self) -> None:
        self.folder = _folder(self.source)
        images = self.folder is not None and self.kind in IMAGE_KINDS
        self.table = _table_of(self.folder, self.source.split) if self.folder is not None and images else None
        # Names are relative to this folder.
        self.root = os.path.dirname(self.table) if self.table is not None else self.folder
        parent = self.root or name_folder(self.source) or "."
        roots = [*AllowedRoots(self.source.image_root).roots.items(), ("", os.path.realpath(parent))]
        self.roots = sorted(roots, key=lambda root: -len(root[1]))  # innermost first
        self.item_source = ItemSource(self._identity(), {"captions": self.captions}, complete=self.source.limit is None)

    def restore_options(self, index: SearchIndex) -> None:
        """Use the options of the last run over this source."""
        self.captions = bool(index.options(self.item_source.identity).get("captions"))
        self.item_source.options["captions"] = self.captions

    def _identity(self) -> dict[str, Any]:
        """Return what stays the same while a source changes: its paths, and which of its columns is indexed.

        How much of it is read, and which captions its images have, is not part of it.
        """
        source = self.source
        paths = [source.path] if isinstance(source.path, str) else source.path
        images = self.kind in IMAGE_KINDS
        content = "image" if images else "positive" if self.kind == "text-pair" else "text"
        return {
            "paths": [os.path.abspath(os.path.expanduser(path)) if _is_local(path) else path for path in paths],
            "items": "images" if images else content,
            "name": source.name,
            "split": source.split,
            "column": source.mapped_columns.get(content),
        }

    def items(self) -> Iterator[Item]:
        """Yield the source's images with their captions, or its texts. No name contains a folder above the source."""
        folder, images = self.folder, self.kind in IMAGE_KINDS
        tars = sorted(Path(folder).glob("*.tar")) if folder is not None and images and self.table is None else []
        has_rows = self.table is not None or bool(tars) or self._is_for_datasets()
        if folder is not None and self.kind == "image-only" and not has_rows:
            yield from self._file_items(folder, find_images(folder, self.exclude))
            return
        matched = image_files(self.source) if self.kind == "image-only" else None
        if matched is not None:
            yield from self._file_items(matched[0], FoundImages(matched[1]))
            return
        image_paths: set[str] = set()
        count = 0
        for name, row in iter_rows(self.source, self.kind):
            if isinstance(row, RowError):
                name = printable(self._name(name))
                self.skipped.append((name, str(row)))
                self.item_source.complete &= not row.file_lost
                self.is_cut |= row.file_lost
                if not row.filtered:  # what a filter excludes may be deleted
                    self.item_source.unread.add(name)
                    # An image has the name of its file, and which file this row names is unknown. In a folder, images
                    # are read without their rows, but captions are not.
                    is_read_anyway = self.table is not None and not self.captions
                    self.item_source.complete &= self.kind not in IMAGE_KINDS or is_read_anyway
                continue
            count += 1
            yield from self._row_items(name, row, image_paths)
        if count == self.source.limit:
            return
        if self.table is not None:
            root = os.path.dirname(self.table)
            files = find_images(root, (*self.exclude, self.table))
            files.names = [n for n in files.names if os.path.realpath(os.path.join(root, n)) not in image_paths]
            self.images_without_row = len(files.names)
            yield from self._file_items(root, files)
        elif tars:
            self.count_files_outside_shards()

    def count_files_outside_shards(self) -> None:
        """Count the files of a folder of tar shards that are not read."""
        if self.folder is None or self.table is not None:
            return
        tars = sorted(Path(self.folder).glob("*.tar"))
        files = find_images(self.folder, (*self.exclude, *tars))
        self.hidden_files, self.other_files = files.hidden, files.others
        self.other_files.update(os.path.splitext(name)[1].lower() for name in files.names)

    def _is_for_datasets(self) -> bool:
        return self.source.format == "hub" or os.path.exists(os.path.join(self.folder or "", "state.json"))

    def _file_items(self, root: str, files: FoundImages) -> Iterator[Item]:
        self.other_files, self.hidden_files = files.others, files.hidden
        for name, reason in files.unreadable:
            self.skipped.append((printable(name), reason))
            self.item_source.unread.add(printable(name))
        self.item_source.complete &= files.complete
        if self.source.column_mapping and self.table is None:
            raise DataError(
                f"'{self.source.title}' has images and no table, so it has no columns. Remove column_mapping."
            )
        if files.names and self.source.clean is not None and self.source.clean.compares_rows:
            if self.table is None:
                raise DataError(
                    f"'{self.source.title}' has images without rows, which filters that compare rows need. Clean a "
                    "copy with bifocal data clean first."
                )
            names = list(map(printable, files.names))
            self.skipped += [(name, "it has no row, which filters that compare rows need") for name in names]
            self.item_source.unread.update(names)
            self.images_without_row = 0
            return
        cleaning = self.source.clean or Cleaning()
        passes, require_new = RowFilter(cleaning), DuplicateFilter(cleaning)
        for number, name in enumerate(files.names):
            path = os.path.join(root, name)
            if self.source.limit is not None and number >= self.source.limit:
                return
            try:
                require_new(passes({"image": path}))
            except RowError as error:
                self.skipped.append((printable(name), str(error)))
                if not error.filtered:
                    self.item_source.unread.add(printable(name))
                continue
            yield Item(printable(name), "", path, has_stable_name=True)

    def _row_items(self, name: str, row: dict[str, Any], image_paths: set[str]) -> Iterator[Item]:
        name = printable(self._name(name))
        if self.kind not in IMAGE_KINDS:
            texts = _as_list(row["positive"] if self.kind == "text-pair" else row["text"])
            yield from (Item(name, text) for text in texts)
            return
        captions, image = _as_list(row.get("caption")), row["image"]
        is_file = isinstance(image, str)
        if is_file:
            image_paths.add(os.path.realpath(image))
            name = printable(self._relative(image) or name)
        yield Item(name, join_captions(captions), image, has_stable_name=is_file)
        if self.captions:
            yield from (
                Item(caption_name(name), caption, has_stable_name=is_file) for caption in captions if caption.strip()
            )

    def _name(self, name: str) -> str:
        """Return the name of a row without the path of what `datasets` loaded, with which it starts."""
        title = self.source.title
        if name.startswith(f"{title}:") and _is_local(title):
            return f"row {name.removeprefix(f'{title}:')}" if self.folder is not None else os.path.basename(name)
        return self._relative(name) or name if os.path.isabs(name) else name

    def _relative(self, path: str) -> str | None:
        """Return a path relative to the innermost root of the source's images."""
        for prefix, root in self.roots:
            if Path(path).is_relative_to(root):
                return "/".join(filter(None, (prefix, os.path.relpath(path, root).replace(os.sep, "/"))))
        return os.path.basename(path) if os.path.isabs(path) else None

    def ignored_files(self) -> list[str]:
        """Return what was not read at all, counted in words."""
        count = sum(self.other_files.values())
        parts = [f"{count:,} files that were not read as images ({by_suffix(self.other_files)})"] if count else []
        return parts + ([f"{self.hidden_files:,} hidden files or folders"] if self.hidden_files else [])


def _is_local(path: str) -> bool:
    return not is_remote(path) and (os.path.exists(os.path.expanduser(path)) or not _HUB_ID.fullmatch(path))


def _as_list(value: Any) -> list[str]:
    if value is None:
        return []
    return [value] if isinstance(value, str) else list(value)
