"""From a path, a pattern or an address to files, and the fence: nothing outside the given roots is read."""

import contextlib
import glob
import gzip
import os
import shutil
import tempfile
import unicodedata
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from bifocal.data.skips import Fault

_PATTERN = frozenset("*?[")
_SPOOLED = 64 * 2**20  # bytes of a fetched file that are held in memory, not on disk
_TIMEOUT = 60.0  # seconds for a server to answer, and between two pieces
GZIP = (".gz", ".tgz")
MISSING = "missing picture"  # the cause of a row whose image is not there


def is_remote(path: str) -> bool:
    return "://" in path


def expand(paths: str | Sequence[str]) -> list[str]:
    """Every file that paths, brace patterns (`{00000..00041}`) and globs name, in order.

    A brace pattern names its files whether they are there or not; a glob only those that are. Patterns may be local, or
    begin with `hf://`; addresses beginning with `https://` take braces only.
    """
    from braceexpand import UnbalancedBracesError, braceexpand  # type: ignore[attr-defined]

    found: list[str] = []
    for path in [paths] if isinstance(paths, str) else paths:
        try:
            spelt = list(braceexpand(path))
        except UnbalancedBracesError:
            spelt = [path]
        for one in spelt:
            if not _PATTERN & set(one) or one.startswith(("http://", "https://")):
                found.append(os.path.expanduser(one))
            elif is_remote(one):
                import fsspec

                filesystem, inner = fsspec.url_to_fs(one)
                found += sorted(filesystem.unstrip_protocol(match) for match in filesystem.glob(inner))
            else:
                found += sorted(glob.glob(os.path.expanduser(one), recursive=True))
    return found


def open_file(path: str) -> BinaryIO:
    """A file here or elsewhere, uncompressed where its name ends in .gz, that can be sought in.

    Raises:
        OSError: it is not there or cannot be read.
    """
    if not is_remote(path):
        if os.path.isdir(path):
            raise IsADirectoryError(f"'{path}' is a folder")
        return gzip.open(path, "rb") if path.endswith(GZIP) else open(path, "rb")  # type: ignore[return-value]
    if path.startswith(("http://", "https://")):
        file: Any = _fetch(path)
    else:
        import fsspec

        file = fsspec.open(path, "rb").open()
    return gzip.open(file, "rb") if path.endswith(GZIP) else file


def _fetch(address: str) -> Any:
    """A whole file from a web server: it is read from end to end, and not every server sends parts."""
    with contextlib.ExitStack() as unless_whole:
        file = unless_whole.enter_context(tempfile.SpooledTemporaryFile(_SPOOLED))
        request = urllib.request.Request(address, headers={"User-Agent": "bifocal"})
        try:
            with urllib.request.urlopen(request, timeout=_TIMEOUT) as answer:
                shutil.copyfileobj(answer, file, 2**20)
                promised = answer.headers.get("Content-Length")
        except urllib.error.HTTPError as error:
            if error.code in (404, 410):
                raise FileNotFoundError(f"'{address}' is not there ({error.code})") from error
            raise
        if promised is not None and file.tell() < int(promised):  # urllib takes a cut connection for an end
            raise ConnectionError(f"'{address}' broke off after {file.tell():,} of {int(promised):,} bytes")
        file.seek(0)
        unless_whole.pop_all()  # whoever asked for the file closes it
        return file


class Fence:
    """The folders that pictures may be read from.

    Args:
        roots: a folder, or for each first part of a path the folder that holds the rest (ShareGPT4V's `coco/...`,
            `sam/...`); the key "" stands for all others. None: no picture may be named by a path.
    """

    def __init__(self, roots: str | Mapping[str, str] | None) -> None:
        given = {"": roots} if isinstance(roots, str) else dict(roots or {})
        self.roots = {prefix.strip("/"): os.path.realpath(os.path.expanduser(root)) for prefix, root in given.items()}

    def resolve(self, given: str) -> str:
        """The file that a path names.

        Raises:
            Fault: if it is an address, leads out of its root (also through a link), has no root, or no file is there.
        """
        if is_remote(given) or given.startswith("data:"):
            raise Fault(
                "path outside the roots",
                f"{shown(given)} is an address; download the images, and name them by their files",
            )
        prefix = max((p for p in self.roots if not p or given.startswith(f"{p}/")), key=len, default=None)
        if prefix is None:
            known = ", ".join(self.roots) or "none is given"
            raise Fault(
                "path outside the roots",
                f"{shown(given)} is below none of the folders of images ({known}); set images=FOLDER",
            )
        root = self.roots[prefix]
        path = os.path.realpath(os.path.join(root, given[len(prefix) :].lstrip("/") if prefix else given))
        found = existing(path, root) if Path(path).is_relative_to(root) else None
        if not Path(found or path).is_relative_to(root):
            raise Fault(
                "path outside the roots",
                f"{shown(given)} is not below {root}; set images to the folder that holds the images, such as "
                "images=FOLDER",
            )
        if found is None:
            raise Fault(MISSING, path)
        return found


def existing(path: str, root: str = "") -> str | None:
    """Return the file that a path names, also where its name is spelt otherwise on disk; None if there is none.

    Names with accents come in two forms of Unicode (macOS writes NFD, most others NFC), and tables made on Windows have
    backslashes.

    Args:
        root: the beginning of the path that is spelt right.
    """
    if os.path.exists(path):
        return path
    inner = path.removeprefix(root)
    for one in (inner, inner.replace("\\", "/")):
        for spelt in (one, unicodedata.normalize("NFC", one), unicodedata.normalize("NFD", one)):
            if os.path.exists(root + spelt):
                return os.path.realpath(root + spelt)
    return None


def shown(path: str) -> str:
    """Return a path for a message; what is too long to be one (an image in base64) is not repeated."""
    return path if len(path) <= 300 else f"{path[:40]}... ({len(path):,} characters)"


class LoadedFence(Fence):
    """The places that `datasets` itself has put pictures into: its caches, and the folder that it was told to load.

    Args:
        folder: that folder; None for a data set of the Hub.
    """

    def __init__(self, folder: str | None) -> None:
        import datasets
        from huggingface_hub import constants

        super().__init__(None)
        places = [
            datasets.config.HF_DATASETS_CACHE,
            constants.HF_HUB_CACHE,
            constants.HF_HOME,
            *([folder] if folder else []),
        ]
        self.places = [os.path.realpath(os.path.expanduser(place)) for place in places]

    def resolve(self, given: str) -> str:
        if is_remote(given):
            if "hf://" in given:
                return given
            raise Fault("path outside the roots", f"{shown(given)} is not on the Hub")
        path = os.path.realpath(given)
        if not os.path.isabs(given) or not any(Path(path).is_relative_to(place) for place in self.places):
            raise Fault("path outside the roots", f"{shown(given)} is not a file that datasets has loaded")
        if not os.path.exists(path):
            raise Fault(MISSING, path)
        return path
