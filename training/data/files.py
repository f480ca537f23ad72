"""The rows of one file, from a position on; what is broken comes as a fault in the place of its row.

`datasets` has readers for these formats, and reads what is on the Hub here; but they stop at the first broken row.
"""

import codecs
import csv
import io
import json
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, BinaryIO, NamedTuple

from bifocal.training.data.faults import Fault
from bifocal.training.data.image_files import find_images, image_suffixes
from bifocal.training.data.places import GZIP, open_file

PICTURES = image_suffixes()
_LONGEST_LINE = 64 * 2**20  # bytes
_FIELD = 2**24  # characters of a field of a CSV file; Python's own limit is 131,072


class Row(NamedTuple):
    """A row of a file.

    Args:
        position: where to begin for the rows after this one; plain JSON.
        name: of the row, for logs: the file's name and what finds the row in it.
        value: its columns, or why it has none.
    """

    position: Any
    name: str
    value: dict[str, Any] | Fault


Reader = Callable[[str, Any], Iterator[Row]]


def short(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2]


def lost(error: Exception) -> Fault:
    """The fault of a file that cannot be read, or not further."""
    if isinstance(error, FileNotFoundError):
        return Fault("missing file", _said(error), shard=True)
    return Fault("file breaks off", _said(error), shard=True)


def _said(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def read_json_lines(path: str, start: Any = None) -> Iterator[Row]:
    """JSONL, plain or gzipped; a position is a number of bytes."""
    position, number = start or (0, 0)
    with open_file(path) as file:
        file.seek(position)
        while True:
            try:
                line = file.readline(_LONGEST_LINE)
            except (OSError, EOFError) as error:  # gzip says EOFError where it was cut
                yield Row(None, f"{short(path)}:{number + 1}", lost(error))
                return
            if not line:
                return
            position, number = position + len(line), number + 1
            if line.strip():
                yield Row((position, number), f"{short(path)}:{number}", _parsed(line))


def _parsed(line: bytes) -> dict[str, Any] | Fault:
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return Fault("not UTF-8", str(error)[:200])
    except (ValueError, RecursionError) as error:
        return Fault("broken JSON", str(error)[:200])
    return value if isinstance(value, dict) else Fault("broken JSON", f"a {type(value).__name__} and no object")


def read_json(path: str, start: Any = None) -> Iterator[Row]:
    """A JSON file: one array of objects, read piece by piece, or lines. A position is a number of rows."""
    with open_file(path) as file:
        first = next((byte for byte in iter(lambda: file.read(1), b"") if byte.strip()), b"")
    if first != b"[":
        yield from read_json_lines(path, start)
        return
    import ijson

    number = 0
    with open_file(path) as file:
        try:
            for value in ijson.items(_Utf8(file), "item", use_float=True):
                number += 1
                if number <= (start or 0):
                    continue
                found = value if isinstance(value, dict) else Fault("broken JSON", "an entry that is no object")
                yield Row(number, f"{short(path)}:{number}", found)
        except (ijson.JSONError, OSError, EOFError) as error:
            yield Row(None, f"{short(path)}:{number + 1}", lost(error))


class _Utf8:
    """A file in which broken bytes read as a JSON escape that no text may have, so that one does not end an array."""

    def __init__(self, file: BinaryIO) -> None:
        codecs.register_error("bifocal-escape", lambda error: ("\\u0000", getattr(error, "end", 0)))
        self.file = io.TextIOWrapper(file, encoding="utf-8", errors="bifocal-escape", newline="")

    def read(self, size: int = -1) -> bytes:
        return self.file.read(size).encode()


def read_csv(path: str, start: Any = None, header: tuple[str, ...] | None = None, quotes: bool = True) -> Iterator[Row]:
    """CSV, or TSV by its name; a position is a number of rows.

    Args:
        header: the names of the columns, where the file has no line with them.
        quotes: whether quotes around a field mean anything; in MS MARCO's files they do not.
    """
    tabs = path.removesuffix(".gz").endswith(".tsv")
    quoting: Any = csv.QUOTE_MINIMAL if quotes else csv.QUOTE_NONE
    csv.field_size_limit(_FIELD)
    number = 0
    with open_file(path) as file:
        # A byte that is no UTF-8 becomes a lone surrogate, which the row is refused for.
        text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
        reader = csv.reader(text, delimiter="\t" if tabs else ",", quoting=quoting)
        names = list(header or ())
        while True:
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                number += 1
                yield Row(number, f"{short(path)}:{number}", Fault("broken CSV", str(error)))
                continue
            except (OSError, EOFError) as error:
                yield Row(None, f"{short(path)}:{number + 1}", lost(error))
                return
            if not names:
                names = fields
                continue
            number += 1
            if number <= (start or 0) or not fields:
                continue
            value: dict[str, Any] | Fault = dict(zip(names, fields, strict=False))
            if len(fields) != len(names):
                value = Fault("broken CSV", f"{len(fields)} fields under a header of {len(names)}")
            yield Row(number, f"{short(path)}:{number}", value)


def read_parquet(path: str, start: Any = None) -> Iterator[Row]:
    """Parquet; a position is a number of rows."""
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile

    number = start or 0
    with open_file(path) as file:
        try:
            parquet = ParquetFile(file)
            first = group = 0
            groups = parquet.metadata.num_row_groups
            while group < groups and first + parquet.metadata.row_group(group).num_rows <= number:
                first, group = first + parquet.metadata.row_group(group).num_rows, group + 1
            batches = parquet.iter_batches(256, row_groups=range(group, groups)) if group < groups else ()
            for value in islice(_arrow_rows(batches), number - first, None):
                number += 1
                yield Row(number, f"{short(path)}:{number}", value)
        except (pa.ArrowException, OSError, EOFError) as error:
            yield Row(None, f"{short(path)}:{number + 1}", lost(error))


def read_arrow(path: str, start: Any = None) -> Iterator[Row]:
    """Arrow, as a stream (what `datasets` writes) or as a file; a position is a number of rows."""
    import pyarrow as pa

    number = start or 0
    with open_file(path) as file:
        try:
            try:
                batches: Any = pa.ipc.open_stream(file)
            except pa.ArrowInvalid:
                file.seek(0)
                whole = pa.ipc.open_file(file)
                batches = (whole.get_batch(n) for n in range(whole.num_record_batches))
            for value in islice(_arrow_rows(batches), number, None):
                number += 1
                yield Row(number, f"{short(path)}:{number}", value)
        except (pa.ArrowException, OSError, EOFError) as error:
            yield Row(None, f"{short(path)}:{number + 1}", lost(error))


def _arrow_rows(batches: Any) -> Iterator[Any]:
    for batch in batches:
        for piece in range(0, batch.num_rows, 256):
            try:
                yield from batch.slice(piece, 256).to_pylist()
            except UnicodeDecodeError:  # a string column with bytes that are no UTF-8: row by row
                for row in range(piece, min(piece + 256, batch.num_rows)):
                    try:
                        yield batch.slice(row, 1).to_pylist()[0]
                    except UnicodeDecodeError as error:
                        yield Fault("not UTF-8", str(error)[:200])


def read_pictures(folder: str, start: Any = None) -> Iterator[Row]:
    """Every picture in a folder and its subfolders, by name; a position is a number of rows."""
    for number, name in islice(enumerate(find_images(folder).names, 1), start or 0, None):
        yield Row(number, name, {"image": name})


READERS: dict[str, Reader] = {
    "jsonl": read_json_lines, "json": read_json, "csv": read_csv, "tsv": read_csv, "parquet": read_parquet,
    "arrow": read_arrow,
}  # fmt: skip


def format_of(path: str) -> str | None:
    """The format of a file by its name."""
    name = path.partition("?")[0].lower()
    for ending in GZIP:
        name = name.removesuffix(ending)
    ending = name.rpartition(".")[2]
    if ending == "tar" or path.lower().endswith(".tgz"):
        return "webdataset"
    return ending if ending in READERS else None
