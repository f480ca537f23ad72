"""Turn paths, patterns and addresses into files; images are read from allowed roots only."""

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

from bifocal.data.skips import RowError

_PATTERN = frozenset("*?[")
_SPOOLED = 64 * 2**20  # bytes of a fetched file that are held in memory, not on disk
_TIMEOUT = 60.0  # seconds for a server to answer, and between two pieces
GZIP = (".gz", ".tgz")
MISSING = "missing image"  # the cause of a row whose image is not there


def is_remote(path: str) -> bool:
    return "://" in path


def expand(paths: str | Sequence[str]) -> list[str]:
    """Return every file that paths, brace patterns (`{00000..00041}`) and globs name, in order.

    A brace pattern names its files whether they exist or not, a glob only existing ones. Patterns may be local, or
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
    """Open a local or remote file for reading, decompressed if its name ends in .gz; it can be sought in.

    Raises:
        OSError: if it does not exist or cannot be read.
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


# fsspec does not replace this. Its `simplecache` keeps the half file of a cut connection and serves it at every retry
# (`test_a_connection_that_is_cut`), takes a server's error 500 for a missing file, and holds all files of a run on the
# disk. Its `get_file` stops after 5 minutes, however large the file, and unpacks a .gz that is sent with
# `Content-Encoding: gzip`. Its `compression="infer"` does not know .tgz and needs `fsspec.open`, which does not open a
# local file whose name contains "::".
def _fetch(address: str) -> Any:
    """Download a whole file: it is read from end to end, and not every server sends parts.

    Raises:
        OSError: if it does not exist or the connection is cut.
    """
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


class AllowedRoots:
    """The folders that images may be read from, and how paths are resolved in them.

    Args:
        roots: a folder, or for each first part of a path the folder that holds the rest (ShareGPT4V's `coco/...`,
            `sam/...`); the key "" stands for all others. None means that no image may be named by a path.
    """

    def __init__(self, roots: str | Mapping[str, str] | None) -> None:
        given = {"": roots} if isinstance(roots, str) else dict(roots or {})
        self.roots = {prefix.strip("/"): os.path.realpath(os.path.expanduser(root)) for prefix, root in given.items()}

    def resolve(self, name: str, folder: str | None = None) -> str:
        """Return the file that a path names.

        Args:
            folder: root of all paths, in place of the given ones.

        Raises:
            RowError: if it is an address, leads out of its root (also through a link), has no root or does not exist.
        """
        if is_remote(name) or name.startswith("data:"):
            raise RowError(
                "path outside the roots",
                f"{shown(name)} is an address; download the images, and name them by their files",
            )
        roots = self.roots if folder is None else {"": os.path.realpath(os.path.expanduser(folder))}
        prefix = max((p for p in roots if not p or name.startswith(f"{p}/")), key=len, default=None)
        if prefix is None:
            known = ", ".join(roots) or "none is set"
            raise RowError(
                "path outside the roots",
                f"{shown(name)} is below none of the folders of images ({known}); set image_root=FOLDER",
            )
        root = roots[prefix]
        path = os.path.realpath(os.path.join(root, name[len(prefix) :].lstrip("/") if prefix else name))
        found = existing(path, root) if Path(path).is_relative_to(root) else None
        if not Path(found or path).is_relative_to(root):
            raise RowError(
                "path outside the roots",
                f"{shown(name)} is not below {root}; set image_root to the folder that holds the images, such as "
                "image_root=FOLDER",
            )
        if found is None:
            raise RowError(MISSING, path)
        return found


def existing(path: str, root: str = "") -> str | None:
    """Return the file that a path names, also where its name is spelt differently on disk; None if there is none.

    Names with accents come in two forms of Unicode (macOS writes NFD, most others NFC), and tables made on Windows have
    backslashes.

    Args:
        root: the beginning of the path, which is spelt correctly.
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


class DatasetsRoots(AllowedRoots):
    """The folders that `datasets` reads images from: its caches, and the folder that it loads.

    Args:
        folder: the loaded folder; None for a data set of the Hub.
    """

    def __init__(self, folder: str | None) -> None:
        import datasets
        from huggingface_hub import constants

        super().__init__(None)
        folders = [
            datasets.config.HF_DATASETS_CACHE,
            constants.HF_HUB_CACHE,
            constants.HF_HOME,
            *([folder] if folder else []),
        ]
        self.folders = [os.path.realpath(os.path.expanduser(folder)) for folder in folders]

    def resolve(self, name: str, folder: str | None = None) -> str:
        if is_remote(name):
            if "hf://" in name:
                return name
            raise RowError("path outside the roots", f"{shown(name)} is not on the Hub")
        path = os.path.realpath(name)
        if not os.path.isabs(name) or not any(Path(path).is_relative_to(folder) for folder in self.folders):
            raise RowError("path outside the roots", f"{shown(name)} is not a file that datasets has loaded")
        if not os.path.exists(path):
            raise RowError(MISSING, path)
        return path
