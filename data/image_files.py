"""Find the image files of a folder, and count everything else in it."""

import os
import re
import stat
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from PIL import Image, ImageFile, UnidentifiedImageError

# Pillow registers these, too, but they need other programs, or are not images: PostScript, films, IPTC blocks.
_NO_IMAGES = ("EPS", "MPEG", "IPTC")
# Formats that a file without a suffix is checked for: those with a signature, since others accept any bytes.
_WITH_SIGNATURE = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000")
# Control characters, line ends, and marks that turn the direction of what follows.
_CONTROL = re.compile("[\\x00-\\x1f\\x7f-\\x9f\\u2028-\\u202e\\u2066-\\u2069]")


@cache
def image_suffixes() -> frozenset[str]:
    """Return the suffixes of the image formats that Pillow reads here, in lower case and without their dot."""
    Image.init()
    readable = {
        name
        for name, (factory, _) in Image.OPEN.items()
        # A stub knows a format's name and cannot decode it (WMF, HDF5, GRIB, BUFR).
        if name not in _NO_IMAGES and not (isinstance(factory, type) and issubclass(factory, ImageFile.StubImageFile))
    }
    return frozenset(suffix.lstrip(".") for suffix, name in Image.registered_extensions().items() if name in readable)


@dataclass
class FoundImages:
    """The files of a folder.

    Args:
        names: image files relative to the folder, with slashes, sorted; those below linked folders too.
        others: files that are not images, counted by suffix ("" without one).
        hidden: files and folders whose name begins with a dot; such folders are not entered.
        unreadable: (name, reason) of links without a target, folders that cannot be entered, devices and pipes.
        complete: whether every folder could be entered.
    """

    names: list[str] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)
    hidden: int = 0
    unreadable: list[tuple[str, str]] = field(default_factory=list)
    complete: bool = True


def find_images(folder: str | Path, skip: Iterable[str | Path] = ()) -> FoundImages:
    """Find every image below a folder by suffix, in any case, or by content where a file has no suffix.

    Linked folders are entered, each real folder once, so that loops end.

    Args:
        skip: folders and files that are neither entered nor counted, such as the index that is being written.
    """
    images = FoundImages()
    skipped = {os.path.realpath(path) for path in skip}
    names = {os.path.basename(path) for path in skipped}
    entered: set[tuple[int, int]] = set()
    # Real folders come before links to them, so that a file is named by its own folder.
    folders: list[str] = [""]
    links: list[str] = []
    while folders or links:
        inner = folders.pop(0) if folders else links.pop(0)
        path = os.path.join(folder, inner)
        try:
            about = os.stat(path)
            if (about.st_dev, about.st_ino) in entered or os.path.realpath(path) in skipped:
                continue
            entered.add((about.st_dev, about.st_ino))
            entries = sorted(os.scandir(path), key=lambda entry: entry.name)
        except OSError as error:
            images.unreadable.append((inner or str(folder), f"cannot be read ({error.strerror})"))
            images.complete = False
            continue
        for entry in entries:
            name = f"{inner}/{entry.name}" if inner else entry.name
            if entry.name.startswith("."):
                images.hidden += 1
            elif _is_folder(entry):
                (links if entry.is_symlink() else folders).append(name)
            elif entry.name not in names or os.path.realpath(entry.path) not in skipped:
                _sort_entry(entry, name, images)
    images.names.sort()
    return images


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, or into a folder without permission; it is listed as unreadable
        return False


def _sort_entry(entry: "os.DirEntry[str]", name: str, images: FoundImages) -> None:
    try:
        regular = stat.S_ISREG(entry.stat().st_mode)
    except FileNotFoundError:
        images.unreadable.append((name, "a link without a target"))
        images.complete = False  # a folder from an earlier run may be on a disk that is not mounted now
        return
    except OSError as error:
        images.unreadable.append((name, f"cannot be read ({error.strerror})"))
        images.complete = False  # it may be a folder
        return
    suffix = os.path.splitext(entry.name)[1].lower()
    if not regular:
        images.unreadable.append((name, "no regular file"))
    elif suffix[1:] in image_suffixes() or (not suffix and _is_image(entry.path)):
        images.names.append(name)
    else:
        images.others[suffix] += 1


def _is_image(path: str) -> bool:
    try:
        with Image.open(path, formats=_WITH_SIGNATURE):
            return True
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return False


def printable(name: str) -> str:
    """Return a name that can be stored and printed: bytes that are not UTF-8 and control characters are escaped."""
    try:
        text = os.fsencode(name).decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # a lone surrogate that stands for no byte
        text = name.encode("utf-8", "backslashreplace").decode()
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def by_suffix(others: Counter[str]) -> str:
    """Return counts by suffix in words, such as ".txt 2, .pdf 1, no suffix 1"."""
    first = sorted(others.items(), key=lambda item: (-item[1], item[0]))[:5]
    shown = [f"{printable(suffix) or 'no suffix'} {count:,}" for suffix, count in first]
    more = sum(others.values()) - sum(count for _, count in first)
    return ", ".join(shown + ([f"others {more:,}"] if more else []))
