"""Writes files and folders whole or not at all, and never replaces or removes what Bifocal did not write.

Each folder that Bifocal writes into has a list of its files, `.bifocal-files.json`, with sizes and digests. A file that
is not in the list, or was changed since, belongs to the user, and so does the folder that holds it.
"""

import errno
import glob
import hashlib
import json
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from bifocal.errors import BifocalError

MARKER = ".bifocal-files.json"
_LOCK = f"{MARKER}.lock"
MODEL = "model"
RUN = "training run"
_FORMAT = 1
_SCRATCH = ".bifocal"  # suffix of the scratch folder, which holds a new folder until it is complete
_NEW, _BEFORE = "new", "before"  # in the scratch folder: the new folder, and the one that it replaces


class NotOursError(BifocalError, FileExistsError):
    """A file or folder that may not be replaced."""


def default_cache() -> Path:
    """Return the folder for what can be made or downloaded again: $BIFOCAL_CACHE, or ~/.cache/bifocal."""
    return Path(os.environ.get("BIFOCAL_CACHE") or Path.home() / ".cache" / "bifocal")


def listed(folder: Path) -> dict[str, dict[str, Any]]:
    """Return what Bifocal wrote into a folder: `kind`, `bytes` and `sha256` by path; empty without a list."""
    return _marker(folder)["files"]


def parts(folder: Path) -> set[str]:
    """Return the files and folders at the top of what Bifocal wrote into a folder, folders with a slash at the end."""
    return {first + slash for first, slash, _ in (name.partition("/") for name in listed(folder))}


def require_replaceable(folder: str | Path, kind: str) -> Path:
    """Return the resolved path of a folder that may be replaced as a whole.

    It may be replaced if it does not exist, is empty, or only holds unchanged files that Bifocal listed under the same
    kind. A link is followed and stays.

    Args:
        folder: folder to replace.
        kind: kind of the folder in its list of files: a model, a training run, a Space.

    Raises:
        NotOursError: if it holds something else, is in use (the working directory, the home folder, a mount point), or
            lies in a folder that Bifocal wrote as a whole.
        PermissionError: if it cannot be written.
    """
    folder = Path(folder).expanduser()
    if folder.is_symlink() and not folder.exists():
        raise NotOursError(f"'{folder}' is a link to nothing; remove it or choose another folder.")
    target = folder.resolve()
    if target.exists() and not target.is_dir():
        raise NotOursError(f"'{folder}' is a file; choose another folder.")
    for used, what in ((".", "the working directory"), ("~", "your home folder")):
        if Path(os.path.realpath(os.path.expanduser(used))).is_relative_to(target):
            raise NotOursError(f"'{folder}' is {what} or holds it; choose another folder.")
    if os.path.ismount(target):
        raise NotOursError(f"'{folder}' is a mount point, which cannot be replaced; choose a folder in it.")
    around = next((parent for parent in target.parents if _marker(parent)["whole"]), None)
    if around is not None:
        raise NotOursError(f"'{folder}' lies in '{around}', which Bifocal wrote as a whole; choose a folder outside.")
    _require_writable(target.parent)
    if target.is_dir():
        _require_writable(target)
        _require_ours(target, kind, folder)
    return target


@contextmanager
def replace_folder(folder: str | Path, kind: str) -> Iterator[Path]:
    """Yield the path of a new folder that replaces `folder` at the end, with a list of its files.

    The new folder is written next to the old one. After an error the old one is unchanged. A killed run leaves its
    unfinished folder, which the next call for the same folder removes.

    Args:
        folder: folder to replace.
        kind: kind of the folder in its list of files.

    Raises:
        NotOursError, PermissionError: as for `require_replaceable`, at the beginning and at the end.
    """
    from filelock import FileLock

    target = require_replaceable(folder, kind)
    target.parent.mkdir(parents=True, exist_ok=True)
    _sweep(target)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=_SCRATCH, dir=target.parent))
    with FileLock(scratch / ".lock"):
        try:
            new = scratch / _NEW / target.name
            new.parent.mkdir()
            yield new
            _list_all(new, kind)
            require_replaceable(folder, kind)  # somebody may have written to it in the meantime
            _swap(target, new, scratch / _BEFORE)
        finally:
            _discard(scratch, target)


def remove_folder(folder: Path, kind: str) -> None:
    """Remove a folder that Bifocal wrote as a whole, if it exists.

    Raises:
        NotOursError: if it holds anything else.
    """
    require_removable(folder, kind)
    if folder.exists():
        _remove_listed(folder)


def _remove_listed(folder: Path) -> None:
    """Remove the files in a folder's list, then empty folders; files that were added in the meantime stay."""
    files = listed(folder)
    for name in [*files, *(name for name in list(_entries(folder)) if _is_bytecode(name, files)), MARKER, _LOCK]:
        (folder / name).unlink(missing_ok=True)
    for root, _, _ in os.walk(folder, topdown=False):
        if not os.listdir(root):
            os.rmdir(root)


def require_removable(folder: Path, kind: str) -> None:
    """Check that a folder may be removed.

    Raises:
        NotOursError: if it exists and holds anything that Bifocal did not write.
    """
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise NotOursError(f"'{folder}' is a link or a file that Bifocal did not write; move it away.")
    if folder.exists():
        _require_ours(folder, kind, folder)


def require_overwritable(path: str | Path, kind: str) -> Path:
    """Return the resolved path of a file that may be written: it does not exist, or Bifocal wrote it.

    Raises:
        NotOursError: if it exists, but Bifocal did not write it under this kind, or it was changed since.
        PermissionError: if its folder cannot be written.
    """
    path = Path(path).expanduser()
    target = path.resolve()
    if target.is_dir():
        raise NotOursError(f"'{path}' is a folder; choose another name.")
    if target.exists():
        entry = listed(target.parent).get(target.name)
        if entry is None or entry["kind"] != kind:
            raise NotOursError(
                f"'{path}' exists and is not known as a file of Bifocal's ({MARKER} next to it lists those); choose "
                "another name or move it away."
            )
        if not _is_unchanged(target, entry):
            raise NotOursError(f"'{path}' was changed after Bifocal wrote it; choose another name or move it away.")
    _require_writable(target.parent)
    return target


@contextmanager
def overwrite(path: str | Path, kind: str) -> Iterator[Path]:
    """Yield a scratch path for a file that replaces `path` at the end, and list it as Bifocal's.

    Raises:
        NotOursError, PermissionError: as for `require_overwritable`.
    """
    target = require_overwritable(path, kind)
    with replace_file(target) as scratch:
        yield scratch
        # Known before it is there: a run that is killed right after the replacement must recognise its file.
        coming = _entry(scratch, kind)
        present = listed(target.parent).get(target.name, coming)
        _add_entries(target.parent, {target.name: {**present, "next": coming}})
    record(target.parent, kind, target.name)


@contextmanager
def amend(path: Path) -> Iterator[Path]:
    """Yield a scratch path for a new version of a file that may be the user's; if it was Bifocal's, it stays so."""
    entry = listed(path.parent).get(path.name)
    ours = entry is not None and _is_unchanged(path, entry)
    with replace_file(path) as scratch:
        yield scratch
    if entry is not None and ours:
        record(path.parent, entry["kind"], path.name)


@contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """Yield a scratch path for a file that replaces `path` at the end; after an error, `path` is unchanged.

    It does not check who wrote the file: it is for Bifocal's own file names in Bifocal's own folders.
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
    """Write a value as JSON, whole or not at all."""
    with replace_file(path) as scratch:
        scratch.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def record(folder: Path, kind: str, *names: str) -> None:
    """List files in a folder as Bifocal's in their present state; several processes may do this at once."""
    _add_entries(folder, {name: _entry(folder / name, kind) for name in names})


def _add_entries(folder: Path, entries: dict[str, dict[str, Any]]) -> None:
    from filelock import FileLock

    lock = folder / _LOCK
    with suppress(FileNotFoundError):  # one look, since whoever holds the lock removes it afterwards
        status = lock.lstat()
        if not stat.S_ISREG(status.st_mode) or status.st_size:
            raise NotOursError(f"'{lock}' is not Bifocal's, whose lock is an empty file. Move it away.")
    with FileLock(lock):
        marker = _marker(folder)
        marker["files"] |= entries
        write_json(folder / MARKER, marker)
        # While it is held: waiting processes see that it is gone and create their own.
        lock.unlink(missing_ok=True)


def _marker(folder: Path) -> dict[str, Any]:
    path = folder / MARKER
    try:
        marker = json.loads(path.read_text(encoding="utf-8"))
        whole = all({"kind", "bytes", "sha256"} <= set(entry) for entry in marker["files"].values())
        if marker["format"] == _FORMAT and "whole" in marker and whole and not path.is_symlink():
            return marker
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
    ):  # missing or damaged: no file is known to be ours
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
    # Other weights of the same model have the same size, so large files are hashed, too.
    if not path.is_file() or path.is_symlink():
        return False
    states = [entry, *filter(None, [entry.get("next")])]  # "next": a run was killed while it replaced the file
    fitting = [state for state in states if state["bytes"] == path.stat().st_size]
    return bool(fitting) and _sha256(path) in {state["sha256"] for state in fitting}


def _entries(folder: Path) -> Iterator[str]:
    """Yield all files, links and empty folders below a folder, the top level first, without the list itself."""

    def stop(error: OSError) -> None:
        raise error

    for root, folders, names in os.walk(folder, onerror=stop):
        here = Path(root)
        links = [name for name in folders if (here / name).is_symlink()]
        if not folders and not names and here != folder:
            yield here.relative_to(folder).as_posix()
        for name in sorted([*names, *links]):
            path = (here / name).relative_to(folder).as_posix()
            if path not in (MARKER, _LOCK):
                yield path
        folders.sort()


def _require_ours(folder: Path, kind: str, name_in_error: Path) -> None:
    """Check that a folder only holds unchanged files of a kind.

    Raises:
        NotOursError: if it does not; the message has the first other file.
    """
    marker = _marker(folder)
    files, folders = marker["files"], marker.get("folders", ())
    remedy = "choose another folder, or move it away."
    for name in _entries(folder):
        if name not in files:
            if _is_known(folder, name, files, folders):
                continue
            top = name.partition("/")[0]
            shown = name if any(known.startswith(f"{top}/") for known in files) else top
            if not files:
                raise NotOursError(
                    f"'{name_in_error}' holds '{shown}' and no list of files that Bifocal wrote ({MARKER}); choose "
                    "another folder, or empty this one."
                )
            raise NotOursError(f"'{name_in_error}' holds '{shown}', which Bifocal did not write; {remedy}")
        if files[name]["kind"] != kind:
            raise NotOursError(
                f"'{name}' in '{name_in_error}' belongs to a {files[name]['kind']}, not a {kind}; {remedy}"
            )
        if not _is_unchanged(folder / name, files[name]):
            raise NotOursError(f"'{name}' in '{name_in_error}' was changed after Bifocal wrote it; {remedy}")


def _is_known(folder: Path, name: str, files: dict[str, Any], folders: Sequence[str]) -> bool:
    """Return whether an entry is in the list, or follows from entries that are."""
    ours = name in files or _is_bytecode(name, files)
    return ours or (_is_folder(folder / name) and _is_our_folder(name, files, folders))


def _is_our_folder(name: str, files: dict[str, Any], folders: Sequence[str]) -> bool:
    """Return whether an empty folder was written empty, or held files that were removed since."""
    return name in folders or any(known.startswith(f"{name}/") for known in files)


def _is_bytecode(name: str, files: dict[str, Any]) -> bool:
    """Return whether a file is the bytecode of a listed module: running a Space does not change it."""
    path = Path(name)
    module = path.parent.parent / f"{path.name.partition('.')[0]}.py"
    return path.suffix == ".pyc" and path.parent.name == "__pycache__" and module.as_posix() in files


def _require_writable(target: Path) -> None:
    """Check that a folder, or its nearest existing parent, can be written.

    Raises:
        PermissionError: if it cannot.
    """
    existing = next(path for path in (target, *target.parents) if path.exists())
    effective = os.access in os.supports_effective_ids
    if not os.access(existing, os.W_OK | os.X_OK, effective_ids=effective):
        code = errno.EROFS if os.statvfs(existing).f_flag & os.ST_RDONLY else errno.EACCES
        raise PermissionError(code, os.strerror(code), str(existing))


def _swap(target: Path, new: Path, before: Path) -> None:
    """Move `target` to `before` and `new` to `target`; after an error, undo it."""
    existed = target.exists()
    if existed:
        shutil.copymode(target, new)
        try:
            os.rename(target, before)
        except OSError as error:
            if error.errno == errno.EBUSY:
                raise NotOursError(f"'{target}' is a mount point or in use; choose another folder.") from error
            raise
        files, folders = listed(before), _marker(before).get("folders", [])
        added = next((name for name in _entries(before) if not _is_known(before, name, files, folders)), None)
        if added is not None:  # while the files were compared
            os.rename(before, target)
            raise NotOursError(f"'{added}' was put into '{target}' in the meantime; move it away and try again.")
    try:
        os.rename(new, target)
    except BaseException:
        if existed:
            os.rename(before, target)
        raise


def _discard(scratch: Path, target: Path) -> None:
    """Remove a scratch folder; restore the replaced folder if the run was killed between the two renames."""
    before = scratch / _BEFORE
    if before.exists() and not target.exists():
        os.rename(before, target)
    shutil.rmtree(scratch, ignore_errors=True)


def _sweep(target: Path) -> None:
    """Remove scratch folders of killed runs for the same folder; running ones hold their lock."""
    from filelock import FileLock, Timeout

    for scratch in target.parent.glob(f".{glob.escape(target.name)}.*{_SCRATCH}"):
        if (scratch / ".lock").is_file() and {path.name for path in scratch.iterdir()} <= {".lock", _NEW, _BEFORE}:
            try:
                with FileLock(scratch / ".lock", timeout=0):
                    _discard(scratch, target)
            except Timeout:
                continue
