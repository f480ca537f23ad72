"""Write a filtered copy of a source as Parquet files, which can then be streamed.

The files of a source are cleaned independently, in this process, in several, or on a Ray cluster. What each gives is
kept in a hidden folder until all are complete, so that a killed run resumes.
"""

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bifocal.data.filters import Cleaning
from bifocal.data.loading import load_source, named_source, open_stream
from bifocal.data.locate import SourceSplit
from bifocal.data.parallel import Execution, TaskFailed, run_tasks
from bifocal.data.paths import MISSING
from bifocal.data.skips import RowError, SkipLog, SkippedRow, require_log, start_log
from bifocal.data.source import Source
from bifocal.data.splits import split_source
from bifocal.data.tables import row_features, rows_fingerprint, uniform_rows
from bifocal.errors import DataError, first_line

_ROWS = 10_000  # rows per file
_GROUP = 256  # rows held in memory, images included
_PART_BYTES = 64 * 2**20  # small files of a source are cleaned together
_UNFINISHED = ".unfinished"
_LOCK = ".lock"
_NEW_PLAN = "new-plan"
_PLAN = "plan.json"  # what an interrupted move of complete parts still has to move
_COUNTS, _SKIPS = "counts.json", "skips.jsonl"
_PART_NAME = re.compile(r"\d{5}-(whole|[0-9a-f]{16})(\.\w{8})?")  # with a suffix while it is written
_PART_FILE = re.compile(rf"\d{{5}}\.parquet|{re.escape(_COUNTS)}|{re.escape(_SKIPS)}")


@dataclass(frozen=True)
class _Part:
    """Some files of a source, cleaned by one task.

    Args:
        name: first of its files, for messages.
        sources: the files as sources, or one source that is read as a whole.
        features: `datasets.Features` of the rows; None for a source that `datasets` loads.
        folder: its folder when it is complete.
        shown: folder of the copy, for messages.
    """

    name: str
    sources: tuple[Source, ...]
    kind: str
    features: Any
    folder: Path
    shown: Path


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
    parts = _parts(source, kind, unfinished, out)
    key = _key(source, kind, parts)
    unfinished.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(unfinished / _LOCK, timeout=0):
            plan = _read_plan(out)
            if plan is None:
                _write_parts(parts, unfinished, execution or Execution())
                if skipped.log is not None:
                    start_log(skipped.log)
                rows = _count(parts, title, source.max_bad_fraction, skipped)
                plan = _write_plan(parts, unfinished, key, rows, skipped)
            elif plan["key"] == key:
                skipped.load_state(plan["skipped"])
            else:
                raise DataError(
                    f"'{out}' has rows of a run with another source or other filters, stopped while it moved its "
                    "files. Run that command again, or choose another folder."
                )
            _publish(plan, out)
            for folder in filter(Path.is_dir, list(unfinished.iterdir())):  # the plan stays until no part does
                _remove_part(folder)
            for name in (_PLAN, _LOCK):
                (unfinished / name).unlink(missing_ok=True)
            unfinished.rmdir()
    except Timeout:
        raise DataError(f"Another run is writing to '{out}'. Wait for it or choose another folder.") from None
    return int(plan["rows"])


def _require_free(out: Path) -> None:
    """Require that a folder is empty, or holds what a stopped run left.

    Raises:
        DataError: if it holds anything else.
    """
    names = [path.name for path in sorted(out.iterdir())] if out.exists() else []
    plan = _read_plan(out) or {"files": {}}
    moved = {name for name, path in plan["files"].items() if not (out / _UNFINISHED / path).exists()}
    others = [name for name in names if name not in ("skipped.jsonl", _UNFINISHED, *moved)]
    if _UNFINISHED in names:
        inside = [path for path in sorted((out / _UNFINISHED).iterdir()) if path.name not in (_LOCK, _PLAN, _NEW_PLAN)]
        others += [str(path.relative_to(out)) for path in inside if not _PART_NAME.fullmatch(path.name)]
        others += [str(file.relative_to(out)) for part in inside if part.is_dir() for file in _foreign(part)]
    if others:
        raise DataError(f"'{out}' is not empty (it has {others[0]}). Choose another folder or empty this one.")


def _foreign(part: Path) -> list[Path]:
    """Return what lies in the folder of a part and was not written by a run."""
    return [path for path in sorted(part.iterdir()) if path.is_symlink() or not _PART_FILE.fullmatch(path.name)]


def _remove_part(folder: Path) -> None:
    """Remove the folder of a part.

    Raises:
        DataError: if it holds anything that a run does not write.
    """
    foreign = _foreign(folder)
    if folder.is_symlink() or not _PART_NAME.fullmatch(folder.name) or foreign:
        other = foreign[0] if foreign else folder
        raise DataError(f"'{other}' was not written by Bifocal. Move it away and run the command again.")
    (folder / _COUNTS).unlink(missing_ok=True)  # first: without it, the part counts as not written
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


def _parts(source: Source, kind: str, unfinished: Path, shown: Path) -> list[_Part]:
    """Return the parts of a source, the same ones however they are run."""
    cleaning = source.clean or Cleaning()
    compares = cleaning.consistency is not None or cleaning.compares_signatures or bool(cleaning.exclude_rows_of)
    reads_whole = source.path == "symbols" or compares
    stream = None if reads_whole else open_stream(source, kind)
    if stream is None:  # it has no files, or its rows are compared with one another
        return [_Part(source.title, (source,), kind, None, unfinished / "00000-whole", shown)]
    features = row_features(stream, source)
    groups: list[list[Source]] = []
    size = 0.0
    for split in split_source(source, kind):
        bytes_of_file = _size(split)
        if not groups or size + bytes_of_file > _PART_BYTES:
            groups.append([])
            size = 0.0
        groups[-1].append(split)
        size += bytes_of_file
    parts = []
    for number, group in enumerate(groups):
        files = [rows_fingerprint(split, kind, _files(split, stream.shards)) for split in group]
        key = hashlib.blake2b(repr([files, features]).encode(), digest_size=8).hexdigest()
        parts.append(_Part(group[0].title, tuple(group), kind, features, unfinished / f"{number:05}-{key}", shown))
    return parts


def _files(split: Source, whole: Any) -> list[str]:
    """Return the files of a split: itself, or those of a source that is read as a whole."""
    return [str(split.path)] if isinstance(split, SourceSplit) else list(whole)


def _size(split: Source) -> float:
    """Return the size of a file in bytes; infinity if it is not known."""
    path = split.path
    return os.path.getsize(path) if isinstance(path, str) and os.path.isfile(path) else float("inf")


def _write_parts(parts: list[_Part], unfinished: Path, execution: Execution) -> None:
    """Write the parts that do not exist yet.

    Raises:
        DataError: if some cannot be written.
    """
    from tqdm import tqdm

    for path in unfinished.glob("*.*"):
        if path.name not in (_LOCK, _PLAN):
            _remove_part(path)  # begun by a process that was killed
    parts_to_write = [part for part in parts if not _is_complete(part)]
    failed: list[TaskFailed] = []
    with tqdm(total=len(parts), initial=len(parts) - len(parts_to_write), unit="part", disable=None) as progress:
        for result in run_tasks(parts_to_write, _MakeCleaner(), execution, lambda part: part.name):
            failed += [result] if isinstance(result, TaskFailed) else []
            progress.update()
    if len(parts) == 1 and failed:
        raise DataError(failed[0].message)
    if failed:
        raise DataError(
            f"{len(failed)} of {len(parts)} parts failed, such as {failed[0].name} ({failed[0].message}). Run the "
            "command again; it resumes."
        )
    lost = next((part for part in parts if not (part.folder / _COUNTS).exists()), None)
    if lost is not None:
        raise DataError(f"'{lost.shown}' is not shared by all nodes of the Ray cluster. Choose a folder that is.")


def _is_complete(part: _Part) -> bool:
    """Return whether an earlier run wrote a part, with nothing that may be read better now; remove it if not."""
    if not part.folder.exists():
        return False
    is_written = (part.folder / _COUNTS).exists()  # not if a run was killed while it removed the part
    if (
        is_written
        and part.features is not None
        and not any(skip.cause == MISSING or skip.file_lost for skip in _skips(part))
    ):
        return True
    _remove_part(part.folder)
    return False


@dataclass(frozen=True)
class _MakeCleaner:
    def __call__(self) -> Callable[[_Part], int]:
        return _clean


def _clean(part: _Part) -> int:
    """Write a part, whole or not at all, and return the number of its rows.

    Raises:
        DataError: if it cannot be written.
    """
    counts = part.folder / _COUNTS
    if counts.exists():  # by an actor that was killed before it could say so
        return int(json.loads(counts.read_text())["good"])
    scratch = None
    try:
        scratch = Path(tempfile.mkdtemp(prefix=f"{part.folder.name}.", dir=part.folder.parent))
        rows = _write_part(part, scratch)
        os.rename(scratch, part.folder)
        return rows
    except OSError as error:
        raise DataError(f"Cannot write to {part.shown} ({first_line(error)}); free space or choose another.") from error
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)


def _write_part(part: _Part, folder: Path) -> int:
    from pyarrow.parquet import ParquetWriter

    with (folder / _SKIPS).open("w", encoding="utf-8", errors="backslashreplace") as file:
        recorder = _Recorder(file)
        good = number = held = 0
        writer: Any = None
        try:
            for table in _tables(part, recorder):
                while table.num_rows:
                    if writer is None:
                        writer = ParquetWriter(folder / f"{number:05}.parquet", table.schema)
                        number, held = number + 1, 0
                    rows = table.slice(0, _ROWS - held)
                    writer.write_table(rows)
                    table = table.slice(rows.num_rows)
                    good, held = good + rows.num_rows, held + rows.num_rows
                    if held == _ROWS:
                        writer.close()
                        writer = None
        finally:
            if writer is not None:
                writer.close()
    counts = {"good": good, "rows": recorder.rows.total(), "shards": recorder.shards.total()}
    (folder / _COUNTS).write_text(json.dumps(counts))
    return good


class _Recorder(SkipLog):
    """Writes all about each skipped row to a file.

    Args:
        file: text file.
    """

    def __init__(self, file: Any) -> None:
        super().__init__()
        self.file = file

    def add(self, task: str, rows: int, skips: Iterable[SkippedRow] = (), shards: int = 0) -> None:
        skips = list(skips)
        self.file.writelines(json.dumps(skip, ensure_ascii=False) + "\n" for skip in skips)
        super().add(task, rows, skips, shards)


def _tables(part: _Part, skipped: SkipLog) -> Iterator[Any]:
    """Yield the good rows of a part as Arrow tables that hold their images."""
    import pyarrow as pa
    from datasets.table import embed_table_storage

    if part.features is None:
        source = part.sources[0].model_copy(update={"max_bad_fraction": 1.0})  # judged with the other parts
        data = load_source(source, part.kind, 0, skipped, part.name).with_format("arrow")
        schema = data.features.arrow_schema
        for rows in data.iter(_GROUP):
            yield embed_table_storage(rows.cast(schema))
        return
    schema = part.features.arrow_schema
    for source in part.sources:
        stream = open_stream(source, part.kind)
        assert stream is not None  # by `_parts`
        held: list[dict[str, Any]] = []
        lost = 0
        for name, row in uniform_rows(stream, source.limit, part.features):
            if isinstance(row, RowError):
                lost += row.file_lost
                skipped.add(part.name, 1, [SkippedRow.of(name, row)])
                continue
            skipped.add(part.name, 1)
            held.append({column: row[column] for column in part.features})
            if len(held) == _GROUP:
                yield embed_table_storage(pa.Table.from_pylist(held, schema))
                held = []
        if held:
            yield embed_table_storage(pa.Table.from_pylist(held, schema))
        skipped.add(part.name, 0, shards=len(stream.shards) - lost)


def _skips(part: _Part) -> Iterator[SkippedRow]:
    with (part.folder / _SKIPS).open(encoding="utf-8") as file:
        yield from (SkippedRow(*json.loads(line)) for line in file)


def _count(parts: list[_Part], title: str, max_bad_fraction: float, skipped: SkipLog) -> int:
    """Add the rows of all parts to the counts, and return the number of good ones.

    Raises:
        BadRowsError: if too many are bad.
        DataError: if none is good.
    """
    good = 0
    for part in parts:
        counts = json.loads((part.folder / _COUNTS).read_text())
        good += counts["good"]
        skipped.add(title, counts["rows"], _skips(part), counts["shards"])
    skipped.check(title, max_bad_fraction, ended=True)
    if not good:
        raise DataError(f"'{title}' has no usable row{skipped.example(title)}.")
    return good


def _key(source: Source, kind: str, parts: list[_Part]) -> str:
    """Return what tells the rows of a run from those of others: the source with its filters, and its files."""
    stream = open_stream(source, kind) if len(parts) == 1 and source.path != "symbols" else None
    whole = rows_fingerprint(source, kind, list(stream.shards) if stream is not None else "")
    return "/".join([whole, hashlib.blake2b(repr([part.folder.name for part in parts]).encode()).hexdigest()[:16]])


def _write_plan(parts: list[_Part], unfinished: Path, key: str, rows: int, skipped: SkipLog) -> dict[str, Any]:
    """Write where the files of all parts are to be moved, so that a run that is killed meanwhile resumes."""
    files = [path for part in parts for path in sorted(part.folder.glob("*.parquet"))]
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
    """Return the plan of a run that was stopped while it moved its files; None if there is none."""
    path = out / _UNFINISHED / _PLAN
    return json.loads(path.read_text()) if path.exists() else None


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
