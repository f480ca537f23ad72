"""Write files and folders whole, and know which ones Bifocal wrote: only those are ever replaced or removed.

A folder that Bifocal writes into gets a list of those files, `.bifocal-files.json`, with their sizes and digests. A
file that is not in the list, or that somebody changed since, is the user's, and so is the folder around it.
"""

import errno
import glob
import hashlib
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bifocal.errors import BifocalError

MARKER = ".bifocal-files.json"
_LOCK = f"{MARKER}.lock"
MODEL = "model"
RUN = "training run"
_FORMAT = 1
_SCRATCH = ".bifocal"  # how the name of a folder ends that holds a new folder until it is complete
_NEW, _BEFORE = "new", "before"  # in it: the new folder, and the one that it replaces


class NotOursError(BifocalError, FileExistsError):
    """Why a file or folder may not be replaced, in one sentence."""


def listed(folder: Path) -> dict[str, dict[str, Any]]:
    """Return what Bifocal wrote into a folder: `kind`, `bytes` and `sha256` by path; empty without a list."""
    return _marker(folder)["files"]


def parts(folder: Path) -> set[str]:
    """Return the files and folders at the top of what Bifocal wrote into a folder, folders with a slash at the end."""
    return {first + slash for first, slash, _ in (name.partition("/") for name in listed(folder))}


def require_replaceable(folder: str | Path, kind: str) -> Path:
    """Return the real place of a folder that may be written whole.

    That is one that does not exist yet, is empty, or holds nothing but unchanged files that Bifocal listed as of the
    same kind. Behind a link, the folder it points to is meant, and the link stays.

    Args:
        kind: what the folder is: a model, a training run, a Space.

    Raises:
        NotOursError: if it holds something else, is in use (the working directory, the home folder, a mount point), or
            lies in a folder that Bifocal wrote whole.
        PermissionError: if it cannot be written.
    """
    folder = Path(folder).expanduser()
    if folder.is_symlink() and not folder.exists():
        raise NotOursError(f"'{folder}' is a link to nothing; remove it or choose another folder.")
    place = folder.resolve()
    if place.exists() and not place.is_dir():
        raise NotOursError(f"'{folder}' is a file; choose another folder.")
    for used, what in ((".", "the working directory"), ("~", "your home folder")):
        if Path(os.path.realpath(os.path.expanduser(used))).is_relative_to(place):
            raise NotOursError(f"'{folder}' is {what} or holds it; choose another folder.")
    if os.path.ismount(place):
        raise NotOursError(f"'{folder}' is a mount point, which cannot be replaced; choose a folder in it.")
    around = next((parent for parent in place.parents if _marker(parent)["whole"]), None)
    if around is not None:
        raise NotOursError(f"'{folder}' lies in '{around}', which Bifocal wrote as a whole; choose a place outside.")
    _require_writable(place.parent)
    if place.is_dir():
        _require_writable(place)
        _require_ours(place, kind, folder)
    return place


@contextmanager
def replace_folder(folder: str | Path, kind: str) -> Iterator[Path]:
    """Yield a path at which to make a folder that takes the place of `folder` at the end, with a list of its files.

    The new folder is made beside the old one. If anything fails, the old one is where it was; a run that was killed
    leaves its unfinished folder, which the next call for the same place removes.

    Raises:
        NotOursError, PermissionError: see `require_replaceable`, before anything is made and again at the end.
    """
    from filelock import FileLock

    place = require_replaceable(folder, kind)
    place.parent.mkdir(parents=True, exist_ok=True)
    _sweep(place)
    scratch = Path(tempfile.mkdtemp(prefix=f".{place.name}.", suffix=_SCRATCH, dir=place.parent))
    with FileLock(scratch / ".lock"):
        try:
            made = scratch / _NEW / place.name
            made.parent.mkdir()
            yield made
            _list_all(made, kind)
            require_replaceable(folder, kind)  # somebody may have put something there in the meantime
            _swap(place, made, scratch / _BEFORE)
        finally:
            _discard(scratch, place)


def remove_folder(folder: Path, kind: str) -> None:
    """Remove a folder that Bifocal wrote whole, if there is one.

    Raises:
        NotOursError: if it holds anything else.
    """
    require_removable(folder, kind)
    if folder.exists():
        _remove_listed(folder)


def _remove_listed(folder: Path) -> None:
    """Remove the files in a folder's list, and the folders that are empty then: what came in the meantime stays."""
    files = listed(folder)
    for name in [*files, *(name for name in list(_entries(folder)) if _is_bytecode(name, files)), MARKER, _LOCK]:
        (folder / name).unlink(missing_ok=True)
    for root, _, _ in os.walk(folder, topdown=False):
        if not os.listdir(root):
            os.rmdir(root)


def require_removable(folder: Path, kind: str) -> None:
    """
    Raises:
        NotOursError: if there is a folder that holds anything that Bifocal did not write.
    """
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise NotOursError(f"'{folder}' is a link or a file that Bifocal did not write; move it away.")
    if folder.exists():
        _require_ours(folder, kind, folder)


def require_overwritable(path: str | Path, kind: str) -> Path:
    """Return the real place of a file that may be written: there is none yet, or Bifocal wrote it.

    Raises:
        NotOursError: if a file is there that Bifocal did not write as of this kind, or that was changed since.
        PermissionError: if its folder cannot be written.
    """
    path = Path(path).expanduser()
    place = path.resolve()
    if place.is_dir():
        raise NotOursError(f"'{path}' is a folder; choose another name.")
    if place.exists():
        entry = listed(place.parent).get(place.name)
        if entry is None or entry["kind"] != kind:
            raise NotOursError(
                f"'{path}' exists and is not known as a file of Bifocal's ({MARKER} beside it lists those); choose "
                "another name or move it away."
            )
        if not _is_unchanged(place, entry):
            raise NotOursError(f"'{path}' was changed after Bifocal wrote it; choose another name or move it away.")
    _require_writable(place.parent)
    return place


@contextmanager
def overwrite(path: str | Path, kind: str) -> Iterator[Path]:
    """Yield a path for a file that takes the place of `path` at the end, and list it as Bifocal's.

    Raises:
        NotOursError, PermissionError: see `require_overwritable`.
    """
    place = require_overwritable(path, kind)
    with replace_file(place) as scratch:
        yield scratch
    record(place.parent, kind, place.name)


@contextmanager
def amend(path: Path) -> Iterator[Path]:
    """Yield a path for a new version of a file that may be the user's; whether it is Bifocal's own stays as it was."""
    entry = listed(path.parent).get(path.name)
    ours = entry is not None and _is_unchanged(path, entry)
    with replace_file(path) as scratch:
        yield scratch
    if entry is not None and ours:
        record(path.parent, entry["kind"], path.name)


@contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """Yield a path beside `path` that takes its place at the end; after an error, `path` is as it was.

    It does not ask whose file is there: for files in folders of our own, by names of our own.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.stem}.{secrets.token_hex(4)}{path.suffix}")
    try:
        yield scratch
        if path.exists():
            shutil.copymode(path, scratch)
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON, whole or not at all; see `replace_file`."""
    with replace_file(path) as scratch:
        scratch.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def record(folder: Path, kind: str, *names: str) -> None:
    """List files in a folder as Bifocal's, as they are now; several processes may do so at once."""
    from filelock import FileLock

    entries = {name: _entry(folder / name, kind) for name in names}
    with FileLock(folder / _LOCK):
        marker = _marker(folder)
        marker["files"] |= entries
        write_json(folder / MARKER, marker)
        (folder / _LOCK).unlink(missing_ok=True)  # while it is held: who waits sees that it is gone, and makes its own


def _marker(folder: Path) -> dict[str, Any]:
    path = folder / MARKER
    try:
        marker = json.loads(path.read_text(encoding="utf-8"))
        whole = all({"kind", "bytes", "sha256"} <= set(entry) for entry in marker["files"].values())
        if marker["format"] == _FORMAT and "whole" in marker and whole and not path.is_symlink():
            return marker
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # none, or damaged: nothing is known to be ours
        pass
    return {"format": _FORMAT, "whole": False, "files": {}}


def _list_all(folder: Path, kind: str) -> None:
    names = list(_entries(folder))
    folders = [name for name in names if _is_folder(folder / name)]
    files = {name: _entry(folder / name, kind) for name in names if name not in folders}
    marker = {"format": _FORMAT, "whole": True, "folders": folders, "files": files}
    write_json(folder / MARKER, marker)


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _entry(path: Path, kind: str) -> dict[str, Any]:
    return {"kind": kind, "bytes": path.stat().st_size, "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _is_unchanged(path: Path, entry: dict[str, Any]) -> bool:
    # Other weights of the same model have the same size, so that large files are read as well.
    regular = path.is_file() and not path.is_symlink()
    return regular and path.stat().st_size == entry["bytes"] and _sha256(path) == entry["sha256"]


def _entries(folder: Path) -> Iterator[str]:
    """All files, links and empty folders below a folder, those at its top first; not the list itself."""

    def stop(error: OSError) -> None:
        raise error

    for root, folders, names in os.walk(folder, onerror=stop):
        here = Path(root)
        links = [name for name in folders if (here / name).is_symlink()]
        if not folders and not names and here != folder:
            yield here.relative_to(folder).as_posix()
        for name in sorted([*names, *links]):
            found = (here / name).relative_to(folder).as_posix()
            if found not in (MARKER, _LOCK):
                yield found
        folders.sort()


def _require_ours(place: Path, kind: str, called: Path) -> None:
    """
    Raises:
        NotOursError: with the first file that is not as Bifocal wrote it.
    """
    marker = _marker(place)
    files, folders = marker["files"], marker.get("folders", ())
    remedy = "choose another folder, or move it away."
    for name in _entries(place):
        if name not in files:
            if _is_known(place, name, files, folders):
                continue
            top = name.partition("/")[0]
            shown = name if any(known.startswith(f"{top}/") for known in files) else top
            if not files:
                raise NotOursError(
                    f"'{called}' holds '{shown}' and no list of files that Bifocal wrote ({MARKER}); choose another "
                    "folder, or empty this one."
                )
            raise NotOursError(f"'{called}' holds '{shown}', which Bifocal did not write; {remedy}")
        if files[name]["kind"] != kind:
            raise NotOursError(f"'{name}' in '{called}' belongs to a {files[name]['kind']}, not a {kind}; {remedy}")
        if not _is_unchanged(place / name, files[name]):
            raise NotOursError(f"'{name}' in '{called}' was changed after Bifocal wrote it; {remedy}")


def _is_known(place: Path, name: str, files: dict[str, Any], folders: Sequence[str]) -> bool:
    """Whether an entry is in the list, or comes of what is in it."""
    ours = name in files or _is_bytecode(name, files)
    return ours or (_is_folder(place / name) and _is_our_folder(name, files, folders))


def _is_our_folder(name: str, files: dict[str, Any], folders: Sequence[str]) -> bool:
    """Whether an empty folder was empty when it was written, or held files that somebody has removed since."""
    return name in folders or any(known.startswith(f"{name}/") for known in files)


def _is_bytecode(name: str, files: dict[str, Any]) -> bool:
    """Whether Python made a file of a module in the list: a Space that was tried is still as it was written."""
    path = Path(name)
    module = path.parent.parent / f"{path.name.partition('.')[0]}.py"
    return path.suffix == ".pyc" and path.parent.name == "__pycache__" and module.as_posix() in files


def _require_writable(place: Path) -> None:
    """
    Raises:
        PermissionError: if a folder, or the nearest one around it that exists, cannot be written.
    """
    existing = next(path for path in (place, *place.parents) if path.exists())
    effective = os.access in os.supports_effective_ids
    if not os.access(existing, os.W_OK | os.X_OK, effective_ids=effective):
        code = errno.EROFS if os.statvfs(existing).f_flag & os.ST_RDONLY else errno.EACCES
        raise PermissionError(code, os.strerror(code), str(existing))


def _swap(place: Path, made: Path, before: Path) -> None:
    there = place.exists()
    if there:
        shutil.copymode(place, made)
        try:
            os.rename(place, before)
        except OSError as error:
            if error.errno == errno.EBUSY:
                raise NotOursError(f"'{place}' is a mount point or in use; choose another folder.") from error
            raise
        files, folders = listed(before), _marker(before).get("folders", [])
        came = next((name for name in _entries(before) if not _is_known(before, name, files, folders)), None)
        if came is not None:  # while the files were compared
            os.rename(before, place)
            raise NotOursError(f"'{came}' was put into '{place}' in the meantime; move it away and try again.")
    try:
        os.rename(made, place)
    except BaseException:
        if there:
            os.rename(before, place)
        raise


def _discard(scratch: Path, place: Path) -> None:
    """Remove an unfinished folder; what it was to replace comes back if a kill fell between the two renames."""
    before = scratch / _BEFORE
    if before.exists() and not place.exists():
        os.rename(before, place)
    shutil.rmtree(scratch, ignore_errors=True)


def _sweep(place: Path) -> None:
    """Clean up after runs that were killed while they wrote to this place; those still at it hold their lock."""
    from filelock import FileLock, Timeout

    for left in place.parent.glob(f".{glob.escape(place.name)}.*{_SCRATCH}"):
        if (left / ".lock").is_file() and {path.name for path in left.iterdir()} <= {".lock", _NEW, _BEFORE}:
            try:
                with FileLock(left / ".lock", timeout=0):
                    _discard(left, place)
            except Timeout:
                continue
