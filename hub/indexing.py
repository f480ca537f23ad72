"""What `bifocal index` reads: the images and texts of a folder, file or data set as items of an index."""

import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bifocal.data.filters import RowFilter
from bifocal.data.image_files import FoundImages, by_suffix, find_images, image_suffixes, printable
from bifocal.data.inspection import rows_of
from bifocal.data.loading import METADATA, guess_kind
from bifocal.data.paths import Fence, expand, is_remote
from bifocal.data.skips import Fault
from bifocal.data.source import Source
from bifocal.errors import RecipeError
from bifocal.hub.search.index import SearchIndex
from bifocal.hub.search.items import Item
from bifocal.hub.search.mirror import Origin

KINDS = ("image-text", "image-only", "text-pair", "text-only")
_IMAGES = ("image-text", "image-only")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def kind_of(source: Source, kind: str | None) -> str:
    """Return the kind of rows to read, inferred from files and columns if not given.

    Raises:
        RecipeError: if the kind is not one that is indexed, there is nothing to read, or it cannot be inferred.
    """
    if kind is not None and kind not in KINDS:
        raise RecipeError(f"'{kind}' is no kind that can be indexed; it must be one of {', '.join(KINDS)}.")
    folder = _folder(source)
    if isinstance(source.path, str) and folder is None:
        _require_rows(source.path, kind)
    if folder is not None and not os.listdir(folder):
        raise RecipeError(f"The folder '{source.title}' is empty; nothing can be indexed.")
    if kind is not None:
        return kind
    if _image_files(source) is not None:
        return "image-only"
    try:
        found = guess_kind(source)
    except RecipeError:
        if folder is None:
            raise
        files = find_images(folder)
        if files.names:
            return "image-only"
        there = by_suffix(files.others) or f"{files.hidden} hidden files or folders"
        raise RecipeError(
            f"The folder '{source.title}' holds no images and no table of them ({there}). If datasets can load it, "
            "name the kind of its rows with --kind."
        ) from None
    return "text-pair" if found == "text-triplet" else found


def _image_files(source: Source) -> tuple[str, list[str]] | None:
    """The folder and names of the images that a path or pattern names; None if it names anything else."""
    if not isinstance(source.path, str) or is_remote(source.path) or _folder(source) is not None:
        return None
    files = expand(source.path)
    if not files or any(os.path.splitext(file)[1].lower()[1:] not in image_suffixes() for file in files):
        return None
    # What stands before the pattern: it stays the same whatever files there are.
    root = os.path.dirname(re.split(r"[*?\[{]", os.path.expanduser(source.path))[0]) or "."
    return root, [os.path.relpath(file, root).replace(os.sep, "/") for file in files]


def _folder(source: Source) -> str | None:
    path = os.path.expanduser(source.path) if isinstance(source.path, str) else ""
    return path if os.path.isdir(path) else None


def _require_rows(path: str, kind: str | None) -> None:
    """
    Raises:
        RecipeError: if a path that means a file has no file, or an empty one.
    """
    file = os.path.expanduser(path)
    if os.path.isfile(file):
        if os.path.getsize(file) == 0:
            raise RecipeError(f"The file '{path}' is empty; nothing can be indexed.")
    elif not is_remote(path) and not any(sign in path for sign in "*?[{:") and path != "symbols":
        if not _HUB_ID.fullmatch(path) or path.startswith(".") or os.path.splitext(path)[1]:
            raise RecipeError(f"There is nothing at '{path}'; check the path.")
        if kind is None:
            raise RecipeError(
                f"There is no file or folder '{path}'. If it is a data set of the Hub, name the kind of its rows with "
                "--kind."
            )


def _table_of(folder: str, split: str) -> str | None:
    """The table that names a folder's images."""
    paths = (os.path.join(folder, place, name) for place in ("", split) for name in METADATA)
    return next(filter(os.path.exists, paths), None)


@dataclass
class Reading:
    """The items of one run over a source, and what it left out.

    Args:
        source: to read.
        kind: of its rows.
        captions: captions are items of their own, too.
        skip: folders that are not looked into, such as the index itself.
        faults: receives name and reason of rows and files that cannot be read.
        others: receives files of a folder that are no images, counted by suffix.
        hidden: receives the number of hidden files and folders.
        unnamed: receives the number of images without a row in the folder's table; they are indexed without a caption.
    """

    source: Source
    kind: str
    captions: bool = False
    skip: tuple[Path, ...] = ()
    faults: list[tuple[str, str]] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)
    hidden: int = 0
    unnamed: int = 0

    def __post_init__(self) -> None:
        self.folder = _folder(self.source)
        images = self.folder is not None and self.kind in _IMAGES
        self.table = _table_of(self.folder, self.source.split) if self.folder is not None and images else None
        # The folder that names begin in.
        self.root = os.path.dirname(self.table) if self.table is not None else self.folder
        paths = [self.source.path] if isinstance(self.source.path, str) else self.source.path
        around = self.root or os.path.dirname(os.path.expanduser(paths[0])) or "."
        roots = [*Fence(self.source.images).roots.items(), ("", os.path.realpath(around))]
        self.roots = sorted(roots, key=lambda one: -len(one[1]))  # the innermost first
        self.origin = Origin(self._identity(), {"captions": self.captions}, complete=self.source.limit is None)

    def remember(self, index: SearchIndex) -> None:
        """Take the options that this source was indexed with the last time."""
        self.captions = bool(index.options(self.origin.identity).get("captions"))
        self.origin.options["captions"] = self.captions

    def _identity(self) -> dict[str, Any]:
        """What stays the same while a source changes: where it is, and which of its columns is indexed.

        What only says how much of it is read, or which captions its images have, is no part of it.
        """
        source = self.source
        paths = [source.path] if isinstance(source.path, str) else source.path
        images = self.kind in _IMAGES
        content = "image" if images else "positive" if self.kind == "text-pair" else "text"
        return {
            "paths": [os.path.abspath(os.path.expanduser(path)) if _is_local(path) else path for path in paths],
            "items": "images" if images else content,
            "name": source.name,
            "split": source.split,
            "column": source.columns.get(content),
        }

    def items(self) -> Iterator[Item]:
        """Yield the images of the source, each with its caption, or its texts. Names give away no folder above it."""
        folder, images = self.folder, self.kind in _IMAGES
        tars = sorted(Path(folder).glob("*.tar")) if folder is not None and images and self.table is None else []
        if folder is not None and self.kind == "image-only" and self.table is None and not tars and not self._loaded():
            yield from self._files(folder, find_images(folder, self.skip))
            return
        files = _image_files(self.source) if self.kind == "image-only" else None
        if files is not None:
            yield from self._files(files[0], FoundImages(files[1]))
            return
        seen: set[str] = set()
        good = 0
        for name, row in rows_of(self.source, self.kind):
            if self.source.limit is not None and good >= self.source.limit:
                return
            if isinstance(row, Fault):
                name = printable(self._name(name))
                self.faults.append((name, str(row)))
                self.origin.complete &= not row.shard
                if not row.dropped:  # what a filter drops is not wanted any more
                    self.origin.unread.add(name)
                    # An image has the name of its file, and which one this row names is not known. Those of a folder
                    # are found without it, but not their captions.
                    found_anyway = self.table is not None and not self.captions
                    self.origin.complete &= self.kind not in _IMAGES or found_anyway
                continue
            good += 1
            yield from self._row(name, row, seen)
        if self.table is not None:
            root = os.path.dirname(self.table)
            found = find_images(root, (*self.skip, self.table))
            found.names = [name for name in found.names if os.path.realpath(os.path.join(root, name)) not in seen]
            self.unnamed = len(found.names)
            yield from self._files(root, found)
        elif tars and folder is not None:
            found = find_images(folder, (*self.skip, *tars))
            self.hidden, self.others = found.hidden, found.others
            self.others.update(os.path.splitext(name)[1].lower() for name in found.names)

    def _loaded(self) -> bool:
        return self.source.format == "hub" or os.path.exists(os.path.join(self.folder or "", "state.json"))

    def _files(self, root: str, found: FoundImages) -> Iterator[Item]:
        self.others, self.hidden = found.others, found.hidden
        for name, reason in found.unreadable:
            self.faults.append((printable(name), reason))
            self.origin.unread.add(printable(name))
        self.origin.complete &= found.complete
        if self.source.columns and self.table is None:
            raise RecipeError(
                f"'{self.source.title}' has images and no table, so it has no columns; leave out columns."
            )
        keep = RowFilter(self.source.clean) if self.source.clean is not None else None
        for number, name in enumerate(found.names):
            path = os.path.join(root, name)
            if self.source.limit is not None and number >= self.source.limit:
                return
            try:
                if keep is not None:
                    keep({"image": path})
            except Fault as fault:
                self.faults.append((printable(name), str(fault)))
                if not fault.dropped:
                    self.origin.unread.add(printable(name))
                continue
            yield Item(printable(name), "", path, own_name=True)

    def _row(self, name: str, row: dict[str, Any], seen: set[str]) -> Iterator[Item]:
        name = printable(self._name(name))
        if self.kind not in _IMAGES:
            texts = _all(row["positive"] if self.kind == "text-pair" else row["text"])
            yield from (Item(name, text) for text in texts)
            return
        texts, picture = _all(row.get("caption")), row["image"]
        own = isinstance(picture, str)
        if own:
            seen.add(os.path.realpath(picture))
            name = printable(self._relative(picture) or name)
        yield Item(name, " · ".join(texts), picture, own)
        if self.captions:
            yield from (Item(f"{name}#caption", text, own_name=own) for text in texts)

    def _name(self, name: str) -> str:
        """The name of a row; `datasets` begins it with the path of what it has loaded."""
        title = self.source.title
        if name.startswith(f"{title}:") and _is_local(title):
            return f"row {name.removeprefix(f'{title}:')}" if self.folder is not None else os.path.basename(name)
        return self._relative(name) or name if os.path.isabs(name) else name

    def _relative(self, path: str) -> str | None:
        """A path as it is within the folder that the source's images begin in."""
        for prefix, root in self.roots:
            if Path(path).is_relative_to(root):
                return "/".join(filter(None, (prefix, os.path.relpath(path, root).replace(os.sep, "/"))))
        return os.path.basename(path) if os.path.isabs(path) else None

    def left_out(self) -> list[str]:
        """Return what was passed over without an attempt to read it, in words."""
        count = sum(self.others.values())
        parts = [f"{count:,} files that were not read as images ({by_suffix(self.others)})"] if count else []
        return parts + ([f"{self.hidden:,} hidden files or folders"] if self.hidden else [])


def _is_local(path: str) -> bool:
    return not is_remote(path) and (os.path.exists(os.path.expanduser(path)) or not _HUB_ID.fullmatch(path))


def _all(value: Any) -> list[str]:
    if value is None:
        return []
    return [value] if isinstance(value, str) else list(value)
