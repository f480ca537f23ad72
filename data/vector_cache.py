"""Vectors of many rows, kept in files while they are embedded: a killed run resumes, a second run reads them."""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np

from bifocal.errors import DataError
from bifocal.files import NotOursError, write_json

BATCHES_AT_ONCE = 16  # batches that are written at once: a killed run loses at most as many
_MARKER = ".bifocal-vectors"  # a file of this name marks the folder as ours
_LONGEST_READ = 1.0  # seconds that a run holds the lock of a file to which it adds nothing
_EARLIER = re.compile(r"(captions|images)-[0-9a-f]{16}\.(npy|json)|[0-9a-f]{16}")  # files before there was a marker


def require_cache_folder(folder: str | Path) -> Path:
    """Return the path of a folder for vectors, which is ours, empty or not there.

    Raises:
        NotOursError: if it holds other files, those of an earlier version included, or is a file.
    """
    path = Path(folder).expanduser()
    if path.exists() and not path.is_dir():
        raise NotOursError(f"'{folder}' is a file. Choose a new or empty folder for the cache (--cache).")
    names = [] if not path.is_dir() or (path / _MARKER).is_file() else [inner.name for inner in path.iterdir()]
    if names and all(map(_EARLIER.fullmatch, names)):
        raise NotOursError(
            f"'{folder}' holds vectors of an earlier version of `bifocal mine`, which cannot be reused. Delete it, or "
            "choose another folder for the cache (--cache)."
        )
    if names:
        raise NotOursError(f"'{folder}' holds other files. Choose a new or empty folder for the cache (--cache).")
    return path


class VectorCache:
    """A folder with the vectors of collections of rows, each in a file of its own.

    A hash of all that decides the vectors is in the name of their file, so other rows or another model have another
    file. The vectors are written batch by batch, and may exceed memory.

    Args:
        folder: created with the first vectors.

    Attributes:
        reused: rows whose vectors were there.
        embedded: rows that were embedded.

    Raises:
        NotOursError: if the folder holds other files, or is a file.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = require_cache_folder(folder)
        self.reused = self.embedded = 0

    def create_folder(self) -> None:
        """Create the folder, and mark it as ours.

        Raises:
            NotOursError: if it holds other files by now.
            DataError: if it cannot be written.
        """
        require_cache_folder(self.folder)
        with _file_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            if not (self.folder / _MARKER).is_file():
                (self.folder / _MARKER).touch()

    def vectors(
        self, name: str, identity: Iterable[str], count: int, embed: Callable[[slice], Mapping[int, np.ndarray]],
        rows_at_once: int,
    ) -> np.ndarray:  # fmt: skip
        """Return the vectors (rows, dimensions) of a collection from its file; those that it lacks are embedded.

        Args:
            name: beginning of the file's name.
            identity: all that decides the vectors: the model, how it embeds, and the content of each row.
            count: number of rows.
            embed: returns the vectors of some rows by the number of the row. A row without one has NaN.
            rows_at_once: rows per call of `embed`, after which their vectors are written.

        Returns:
            The file as a read-only array in float32; an array with no dimensions if no row has a vector.

        Raises:
            DataError: if another run is writing this file, it is damaged, or it cannot be written.
        """
        from filelock import FileLock, Timeout

        path = self.folder / f"{name}-{_hash(identity)}.npy"
        self.create_folder()
        lock = FileLock(path.with_suffix(".lock"))
        with _file_errors(self.folder):
            try:
                lock.acquire(timeout=_LONGEST_READ)
            except Timeout:
                raise DataError(
                    f"Another run is writing '{path}'. Wait for its end, or choose another cache."
                ) from None
        try:
            return self._completed(path, count, embed, rows_at_once)
        finally:
            lock.release()

    def _completed(
        self, path: Path, count: int, embed: Callable[[slice], Mapping[int, np.ndarray]], rows_at_once: int
    ) -> np.ndarray:
        with _file_errors(self.folder):
            start, dimensions = _written(path, count)
        self.reused += start
        for part in slices(count, rows_at_once, start):
            new = embed(part)
            self.embedded += len(new)
            if new and not dimensions:
                dimensions = len(next(iter(new.values())))
            if not dimensions:  # rows without a vector so far: they are written with the first that has one
                continue
            block = np.full((part.stop - start, dimensions), np.nan, np.float32)
            for row, vector in new.items():
                block[row - start] = vector
            with _file_errors(self.folder):
                _write(path, block, start, count)
            start = part.stop
        with _file_errors(self.folder):
            return np.load(path, mmap_mode="r") if dimensions else np.empty((count, 0), np.float32)


def slices(count: int, size: int, start: int = 0) -> Iterator[slice]:
    """Yield the slices of `size` rows, from row `start` to row `count`."""
    for first in range(start, count, size):
        yield slice(first, min(first + size, count))


@contextmanager
def _file_errors(folder: Path) -> Iterator[None]:
    """Name the folder in an error of its files: it may be on another disk than a command's results."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"The cache '{folder}' cannot be read or written ({error.strerror or error}). Free space or choose another "
            "folder, and run the command again."
        ) from error


def _hash(parts: Iterable[str]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        content = part.encode("utf-8", "surrogatepass")
        digest.update(b"%d:" % len(content) + content)
    return digest.hexdigest()


def _written(path: Path, count: int) -> tuple[int, int]:
    """Return how many rows of a file are written, and their dimensions; 0 and 0 if there are none.

    Raises:
        DataError: if the file is damaged.
    """
    try:
        rows = int(json.loads(_progress(path).read_text(encoding="utf-8"))["rows"])
    except FileNotFoundError:
        return 0, 0
    except (ValueError, KeyError, TypeError):
        rows = -1
    if not path.exists():
        return 0, 0
    try:
        with path.open("rb") as file:
            (known, dimensions), dtype = _header(file)
            complete = file.tell() + rows * dimensions * dtype.itemsize <= path.stat().st_size
    except (ValueError, IndexError):
        complete = False
    if not complete or not 0 < rows <= count or known != count or dtype != np.float32:
        raise DataError(f"'{path}' is damaged. Delete it and run the command again.")
    return rows, dimensions


def _write(path: Path, block: np.ndarray, start: int, count: int) -> None:
    """Write the vectors from row `start` on, and then how many rows are written."""
    with path.open("r+b" if start else "wb") as file:
        if start:
            _header(file)
            file.seek(start * block.shape[1] * block.itemsize, os.SEEK_CUR)
        else:
            facts = {"descr": np.lib.format.dtype_to_descr(block.dtype), "fortran_order": False}
            np.lib.format.write_array_header_1_0(file, {**facts, "shape": (count, block.shape[1])})
        file.write(block.tobytes())
        file.flush()
        os.fsync(file.fileno())
    write_json(_progress(path), {"rows": start + len(block)})


def _header(file: BinaryIO) -> tuple[tuple[int, int], np.dtype]:
    """Read the header of an array's file; return its shape and dtype.

    Raises:
        ValueError: if it has none.
    """
    np.lib.format.read_magic(file)
    shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    return (shape[0], shape[1]), dtype


def _progress(path: Path) -> Path:
    return path.with_suffix(".rows")  # no suffix of data: the folder may be inside one that is read as a source
