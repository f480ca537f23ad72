"""Write a filtered copy of a source as Parquet files, which can then be streamed.

The files of a source are cleaned independently, in this process, in several, or on a Ray cluster. Filters that compare
rows then compare the signatures of all, and the parts with rows to skip are written again without them. All parts are
kept in a hidden folder until they are complete, so that a killed run resumes.
"""

import hashlib
import json
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from bifocal.data.clean_parts import (
    PART_NAME,
    ROW_FILE,
    MakeWriter,
    Part,
    ReducedPart,
    is_foreign,
    remove_part,
    row_files,
)
from bifocal.data.filters import Cleaning
from bifocal.data.kinds import KINDS
from bifocal.data.leakage import Evaluations, deciding_matches
from bifocal.data.loading import excluded_contents, named_source, open_stream
from bifocal.data.locate import SourceSplit
from bifocal.data.near_duplicates import require_libraries
from bifocal.data.parallel import Execution, TaskFailed, run_tasks
from bifocal.data.part_comparison import compare_parts, signing_key
from bifocal.data.skips import SkipLog, require_log, start_log
from bifocal.data.source import Source
from bifocal.data.splits import split_source
from bifocal.data.tables import row_features, rows_fingerprint
from bifocal.errors import DataError

_PART_BYTES = 64 * 2**20  # small files of a source are cleaned together
_UNFINISHED = ".unfinished"
_MARKER = ".bifocal-clean"  # a file of this name marks the folder as ours
_LOCK = ".lock"
_NEW_PLAN = "new-plan"
_LIBRARIES = ("bifocal", "pillow", "ImageHash", "datasketch")  # on whose versions rows and signatures may depend
_PLAN = "plan.json"  # what an interrupted move of complete parts still has to move
_OURS = (_MARKER, _LOCK, _PLAN, _NEW_PLAN)
_PUBLISHED = re.compile(r"\d{5}-of-\d{5}\.parquet")
_FILE_OF_PART = re.compile(f"{PART_NAME.pattern}/{ROW_FILE}")


def write_clean(source: Source, kind: str, out: Path, skipped: SkipLog, execution: Execution | None = None) -> int:
    """Write the good rows that pass the source's filters, images included, and return their number.

    Rows have the order of the source, however many processes work. The log of skipped rows is overwritten. Where an
    earlier run for the same rows was stopped, its complete parts are used.

    Args:
        out: an empty folder, or that of a run that was stopped. On Ray, all nodes must share it.
        execution: how the files of the source are cleaned; one after the other in this process if omitted.

    Raises:
        DataError: if the folder holds other files; they and the log are left as they are. Also if a part failed.
        NotOursError: if the path of the log has another file.
        BadRowsError: if more rows are bad than the source's `max_bad_fraction` allows.
        OSError: if the folder cannot be written.
    """
    from filelock import FileLock, Timeout

    _require_free(out)
    if skipped.log is not None:
        require_log(skipped.log)
    title = source.title
    cleaning = (source.clean or Cleaning()).model_copy(update={"verify_images": True})
    source = named_source(source).model_copy(update={"streaming": False, "clean": cleaning})
    unfinished = out.absolute() / _UNFINISHED
    parts, evaluations = _parts(source, kind, unfinished, out)
    key = _key(source, kind, parts)
    unfinished.mkdir(parents=True, exist_ok=True)
    _require_free(out)  # listing the source takes long: others may have made this folder, and the marker makes it ours
    (unfinished / _MARKER).touch()
    try:
        with FileLock(unfinished / _LOCK, timeout=0):
            _require_free(out)  # another run may have ended since
            plan = _read_plan(out)
            if plan is None:
                execution = execution or Execution()
                _write_parts(parts, MakeWriter(evaluations), unfinished, execution)
                if skipped.log is not None:
                    start_log(skipped.log)
                _count(parts, title, source.max_bad_fraction, skipped)
                complete = _reduced(parts, title, skipped)
                reduced = [part for part in complete if isinstance(part, ReducedPart)]
                if reduced:
                    _write_parts(reduced, MakeWriter(), unfinished, execution)
                rows = _require_rows(complete, title, skipped)
                plan = _write_plan(complete, unfinished, key, rows, skipped)
            elif plan["key"] == key:
                skipped.load_state(plan["skipped"])
            else:
                raise DataError(
                    f"'{out}' has rows of a run with another source or other filters, stopped while it moved its "
                    "files. Run that command again, or choose another folder."
                )
            _publish(plan, out)
            for folder in filter(Path.is_dir, list(unfinished.iterdir())):  # the plan stays until no part does
                remove_part(folder)
            for name in (_PLAN, _LOCK, _MARKER):
                (unfinished / name).unlink(missing_ok=True)
    except Timeout:
        raise DataError(f"Another run is writing to '{out}'. Wait for it or choose another folder.") from None
    with suppress(OSError):  # a run that was started meanwhile has its lock there
        unfinished.rmdir()  # without the lock's file open, which a network file system would keep under another name
    return int(plan["rows"])


def _require_free(out: Path) -> None:
    """Require that a folder is empty, or holds what a stopped run left.

    Raises:
        DataError: if it holds anything else.
    """
    names = [path.name for path in sorted(out.iterdir())] if out.exists() else []
    others = _foreign_entries(out / _UNFINISHED) if _UNFINISHED in names else []
    if not others:  # the plan is ours
        plan = _read_plan(out) or {"files": {}}
        moved = {name for name, path in plan["files"].items() if not (out / _UNFINISHED / path).exists()}
        others = [out / name for name in names if name not in ("skipped.jsonl", _UNFINISHED, *moved)]
    if others:
        raise DataError(
            f"'{out}' is not empty (it has {others[0].relative_to(out)}). Choose another folder or empty this one."
        )


def _foreign_entries(unfinished: Path) -> list[Path]:
    """Return what no run wrote in the folder of the parts: everything if the folder is not marked as ours."""
    if unfinished.is_symlink() or not unfinished.is_dir():
        return [unfinished]
    inside = sorted(unfinished.iterdir())
    if not (unfinished / _MARKER).is_file():
        return inside
    parts = [path for path in inside if PART_NAME.fullmatch(path.name) and path.is_dir() and not path.is_symlink()]
    foreign = [path for path in inside if path.name not in _OURS and path not in parts]
    return foreign + [path for part in parts for path in sorted(part.iterdir()) if is_foreign(path)]


def _parts(source: Source, kind: str, unfinished: Path, shown: Path) -> tuple[list[Part], Evaluations]:
    """Return the parts of a source, the same ones however they are run, and the sources whose rows are excluded."""
    cleaning = source.clean or Cleaning()
    reads_whole = source.path == "symbols" or cleaning.consistency is not None
    # A limit counts the rows that are no duplicates, so these must be found while reading.
    alone, compared = cleaning.separate(exact=source.limit is None)
    source_alone = source.model_copy(update={"clean": alone})
    stream = None if reads_whole else open_stream(source_alone, kind)
    if stream is None:  # it has no files, or texts are embedded to compare them
        return [Part(source.title, (source,), kind, None, unfinished / "00000-whole", shown)], ()
    require_libraries(compared)
    evaluations = excluded_contents(compared)
    deciding_matches(KINDS[kind], evaluations, source.title)
    compares = compared != Cleaning()
    signing = signing_key(kind, compared, evaluations) if compares else ""
    features = row_features(stream, source)
    groups: list[list[Source]] = []
    size = 0.0
    for split in split_source(source_alone, kind):
        bytes_of_file = _size(split)
        if not groups or size + bytes_of_file > _PART_BYTES:
            groups.append([])
            size = 0.0
        groups[-1].append(split)
        size += bytes_of_file
    parts = []
    for number, group in enumerate(groups):
        files = [rows_fingerprint(split, kind, _files(split, stream.shards)) for split in group]
        key = hashlib.blake2b(repr([files, features, signing, _versions()]).encode(), digest_size=8).hexdigest()
        folder = unfinished / f"{number:05}-{key}"
        parts.append(Part(group[0].title, tuple(group), kind, features, folder, shown, compared if compares else None))
    return parts, evaluations


def _versions() -> list[str | None]:
    """Return the versions of the libraries that parts are written with, so that those of another one are not used."""
    versions: list[str | None] = []
    for library in _LIBRARIES:
        try:
            versions.append(version(library))
        except PackageNotFoundError:
            versions.append(None)
    return versions


def _files(split: Source, whole: Any) -> list[str]:
    """Return the files of a split: itself, or those of a source that is read as a whole."""
    return [str(split.path)] if isinstance(split, SourceSplit) else list(whole)


def _size(split: Source) -> float:
    """Return the size of a file in bytes; infinity if it is not known."""
    path = split.path
    return os.path.getsize(path) if isinstance(path, str) and os.path.isfile(path) else float("inf")


def _write_parts(
    parts: Sequence[Part | ReducedPart], make_writer: MakeWriter, unfinished: Path, execution: Execution
) -> None:
    """Write the parts that do not exist yet.

    Raises:
        DataError: if some cannot be written.
    """
    from tqdm import tqdm

    for path in unfinished.glob("*.*"):
        if path.name not in _OURS:
            remove_part(path)  # begun by a process that was killed
    parts_to_write = [part for part in parts if not part.is_current]
    for part in parts_to_write:
        if part.folder.exists():
            remove_part(part.folder)
    failed: list[TaskFailed] = []
    with tqdm(total=len(parts), initial=len(parts) - len(parts_to_write), unit="part", disable=None) as progress:
        for result in run_tasks(parts_to_write, make_writer, execution, lambda part: part.name):
            failed += [result] if isinstance(result, TaskFailed) else []
            progress.update()
    if len(parts) == 1 and failed:
        raise DataError(failed[0].message)
    if failed:
        raise DataError(
            f"{len(failed)} of {len(parts)} parts failed, such as {failed[0].name} ({failed[0].message}). Run the "
            "command again; it resumes."
        )
    lost = next((part for part in parts if not part.is_written), None)
    if lost is not None:
        raise DataError(f"'{lost.shown}' is not shared by all nodes of the Ray cluster. Choose a folder that is.")


def _count(parts: list[Part], title: str, max_bad_fraction: float, skipped: SkipLog) -> None:
    """Add the rows of all parts to the counts.

    Raises:
        BadRowsError: if too many are bad.
        DataError: if none is good.
    """
    for part in parts:
        counts = part.counts()
        skipped.add(title, counts["rows"], part.skips(), counts["shards"])
    skipped.check(title, max_bad_fraction, ended=True)
    _require_rows(parts, title, skipped)


def _require_rows(parts: Sequence[Part | ReducedPart], title: str, skipped: SkipLog) -> int:
    """Return the number of good rows of all parts.

    Raises:
        DataError: if there are none.
    """
    rows = sum(part.rows for part in parts)
    if not rows:
        raise skipped.no_rows(title, title)
    return rows


def _reduced(parts: list[Part], title: str, skipped: SkipLog) -> list[Part | ReducedPart]:
    """Return the parts without the rows that are skipped for other rows, and add these to the counts."""
    compared = parts[0].compared
    if compared is None:
        return list(parts)
    skips, numbers = compare_parts([part.folder for part in parts], parts[0].kind, compared)
    skipped.add(title, 0, skips)
    return [ReducedPart(part, rows) if len(rows) else part for part, rows in zip(parts, numbers, strict=True)]


def _key(source: Source, kind: str, parts: list[Part]) -> str:
    """Return what tells the rows of a run from those of others: the source with its filters, and its files."""
    stream = open_stream(source, kind) if len(parts) == 1 and source.path != "symbols" else None
    whole = rows_fingerprint(source, kind, list(stream.shards) if stream is not None else "")
    return "/".join([whole, hashlib.blake2b(repr([part.folder.name for part in parts]).encode()).hexdigest()[:16]])


def _write_plan(
    parts: Sequence[Part | ReducedPart], unfinished: Path, key: str, rows: int, skipped: SkipLog
) -> dict[str, Any]:
    """Write where the files of all parts are to be moved, so that a run that is killed meanwhile resumes."""
    files = [path for part in parts for path in row_files(part.folder)]
    targets = {
        f"{number:05}-of-{len(files):05}.parquet": path.relative_to(unfinished).as_posix()
        for number, path in enumerate(files)
    }
    plan = {"key": key, "rows": rows, "skipped": skipped.state(), "files": targets}
    scratch = unfinished / _NEW_PLAN
    scratch.write_text(json.dumps(plan))
    os.replace(scratch, unfinished / _PLAN)
    return plan


def _read_plan(out: Path) -> dict[str, Any] | None:
    """Return the plan of a run that was stopped while it moved its files; None if there is none.

    Raises:
        DataError: if it is damaged.
    """
    path = out / _UNFINISHED / _PLAN
    try:
        plan = json.loads(path.read_text()) if path.exists() else None
        if plan is not None and not _is_plan(plan):
            raise ValueError
        return plan
    except ValueError as error:
        raise DataError(f"'{path}', written by a stopped run, is damaged. Choose another folder.") from error


def _is_plan(plan: Any) -> bool:
    """Return whether a plan has the form of ours, and moves nothing but rows of parts."""
    return (
        isinstance(plan, dict)
        and plan.keys() == {"key", "rows", "skipped", "files"}
        and all(_PUBLISHED.fullmatch(name) and _FILE_OF_PART.fullmatch(path) for name, path in plan["files"].items())
    )


def _publish(plan: dict[str, Any], out: Path) -> None:
    """Move the files of all parts to where a source finds them; those that are there already stay.

    Raises:
        DataError: if one was removed since the run was stopped, or another file has its name.
    """
    for name, path in plan["files"].items():
        if (out / _UNFINISHED / path).exists():
            if os.path.lexists(out / name):
                raise DataError(f"'{out / name}' was written by others. Move it away and run the command again.")
            os.replace(out / _UNFINISHED / path, out / name)
        elif not (out / name).exists():
            raise DataError(f"'{out / name}', written by a stopped run, is missing. Choose another folder.")
