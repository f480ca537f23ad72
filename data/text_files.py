"""Read JSON and JSON Lines row by row; encodings, byte order marks and row names for all text files."""

import codecs
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any, BinaryIO, NamedTuple

from bifocal.data.paths import open_file
from bifocal.data.skips import RowError
from bifocal.errors import first_line

LONGEST_LINE = 64 * 2**20  # bytes; a longer line is one bad row
_CHUNK = 2**18  # characters read at once
_HEAD = 4096  # bytes read to tell UTF-16 and UTF-32 from UTF-8
_BOMS = {  # the longer marks first: that of UTF-32 begins with that of UTF-16
    codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32", codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}  # fmt: skip
_LONE = "bifocal-lone-surrogate"
_DECODER = json.JSONDecoder()
_BLANK = re.compile(r"[ \t\r\n]*")
OTHER_ENCODING = "set encoding if the file is not UTF-8, such as encoding=cp1252"


class Row(NamedTuple):
    """A row of a file.

    Args:
        position: where to resume after this row, in plain JSON types.
        name: name for logs: the file's name and the row's number or line.
        value: its columns, or why it cannot be read.
        folder: folder that its relative image paths start from; None for that of the source.
    """

    position: Any
    name: str
    value: dict[str, Any] | RowError
    folder: str | None = None


Reader = Callable[[str, Any], Iterator[Row]]


class FileError(RowError):
    """Why a whole file cannot be read as its source says, such as another encoding or delimiter."""

    def __init__(self, cause: str, detail: str) -> None:
        super().__init__(cause, detail, file_lost=True)

    def __reduce__(self) -> Any:
        return FileError, (self.cause, self.detail)


def file_name(path: str) -> str:
    """Return the last part of a path."""
    return path.rstrip("/").rpartition("/")[2]


def file_error(error: Exception) -> RowError:
    """Return the error of a file that cannot be read, or not to its end."""
    if isinstance(error, FileNotFoundError):
        return RowError("missing file", first_line(error)[:300], file_lost=True)
    return RowError("file breaks off", first_line(error)[:300], file_lost=True)


def _lone_surrogate(error: UnicodeError) -> tuple[str, int]:
    """Replace bytes that cannot be decoded by a lone surrogate, for which the row is refused later."""
    assert isinstance(error, UnicodeDecodeError)
    return chr(0xDC00 | max(error.object[error.start], 0x80)), error.end


codecs.register_error(_LONE, _lone_surrogate)


def numbered(rows: Iterable[Row], start: Any) -> Iterator[Row]:
    """Yield rows after the first `start`, each with its number as the position."""
    for number, row in islice(enumerate(rows, 1), start or 0, None):
        yield row._replace(position=number)


def is_utf8(encoding: str | None) -> bool:
    """Return whether an encoding is UTF-8, with or without a byte order mark."""
    return encoding is None or codecs.lookup(encoding).name in ("utf-8", "utf-8-sig")


def open_text(path: str, encoding: str | None) -> io.TextIOWrapper:
    """Open a text file with its line ends as they are; bytes that cannot be decoded become lone surrogates.

    Args:
        encoding: a codec of Python; UTF-8, with or without a byte order mark, if None.

    Raises:
        FileError: if no encoding is given and the file is in UTF-16 or UTF-32.
        OSError: if the file cannot be read.
    """
    file = open_file(path)
    try:
        if is_utf8(encoding):
            _require_utf8(file)
    except BaseException:
        file.close()
        raise
    return io.TextIOWrapper(file, "utf-8-sig" if is_utf8(encoding) else encoding, errors=_LONE, newline="")


def _require_utf8(file: BinaryIO) -> None:
    """Require that a file is not in UTF-16 or UTF-32.

    Raises:
        FileError: if the file begins with the byte order mark of another encoding, or with many zero bytes.
    """
    head = file.read(_HEAD)
    file.seek(0)
    for mark, encoding in _BOMS.items():
        if head.startswith(mark):
            raise FileError(
                "not UTF-8", f"it begins with the byte order mark of {encoding.upper()}; set encoding={encoding}"
            )
    zeros = [head[first::4].count(0) for first in range(4)]
    if 4 * sum(zeros) >= len(head) > 0:  # zero bytes are rare in UTF-8
        width = 32 if 3 * sum(zeros) >= 2 * len(head) else 16
        encoding = f"utf-{width}-{'be' if zeros[0] > zeros[3] else 'le'}"
        raise FileError("not UTF-8", f"it begins with zero bytes as {encoding} has them; set encoding={encoding}")


def wrong_encoding(encoding: str | None, error: UnicodeError) -> FileError:
    """Return the error of a file that is not in the encoding that its source sets."""
    return FileError(f"not {encoding}", f"{first_line(error)[:300]}; set another encoding, or none for UTF-8")


def read_json_lines(path: str, start: Any = None, encoding: str | None = None) -> Iterator[Row]:
    """Yield the rows of a JSONL file, plain or gzipped; a position is [bytes, lines]. An array is read, too.

    Raises:
        FileError: if the file is in another encoding, or holds one object over several lines.
    """
    return _read_json(path, start, encoding, ("[{", "[]"))


def read_json(path: str, start: Any = None, encoding: str | None = None) -> Iterator[Row]:
    """Yield the rows of a JSON file: an array of objects, or lines. A position in an array is a number of rows.

    Raises:
        FileError: if the file is in another encoding, or holds one object over several lines.
    """
    return _read_json(path, start, encoding, ("[",))


def _read_json(path: str, start: Any, encoding: str | None, arrays: tuple[str, ...]) -> Iterator[Row]:
    try:
        with open_text(path, encoding) as text:
            head = text.read(_HEAD).lstrip()
    except UnicodeError as error:
        raise wrong_encoding(encoding, error) from error
    except EOFError:  # of gzip; reported when the lines are read
        head = ""
    if "".join(head.split())[:2].startswith(arrays):
        yield from _read_array(path, start, encoding)
        return
    if re.match(r"\{[ \t]*[\r\n]", head):
        raise FileError(
            "broken JSON", "it holds an object over several lines; write one object a line, or an array of objects"
        )
    position, number = start or (0, 0)
    with open_file(path) as raw:
        file: Any = raw if is_utf8(encoding) else io.BufferedReader(_Recoded(raw, encoding or ""), _CHUNK)
        try:
            _skip(file, position, is_utf8(encoding))
            for line, length in _lines(file):
                position, number = position + length, number + 1
                if line is None:
                    row_error = RowError("line too long", f"{length:,} bytes")
                    yield Row((position, number), f"{file_name(path)}:{number}", row_error)
                elif line.strip():
                    yield Row((position, number), f"{file_name(path)}:{number}", _parsed(line))
        except (OSError, EOFError) as error:  # gzip raises EOFError if the file was cut
            yield Row(None, f"{file_name(path)}:{number + 1}", file_error(error))


def _skip(file: Any, position: int, seekable: bool) -> None:
    if seekable:
        file.seek(position)
        return
    while position > 0:
        position -= len(file.read(min(position, _CHUNK))) or position


class _Recoded(io.RawIOBase):
    """A text file in another encoding, as bytes in UTF-8."""

    def __init__(self, file: BinaryIO, encoding: str) -> None:
        self.text = io.TextIOWrapper(file, encoding, errors=_LONE, newline="")
        self.rest = b""

    def readable(self) -> bool:
        return True

    def readinto(self, into: Any) -> int:
        if not self.rest:
            self.rest = self.text.read(_CHUNK // 4).encode("utf-8", "surrogatepass")
        count = min(len(into), len(self.rest))
        into[:count], self.rest = self.rest[:count], self.rest[count:]
        return count


def _lines(file: Any) -> Iterator[tuple[bytes | None, int]]:
    """Yield lines with their lengths in bytes; None for a line that is too long. A carriage return ends a line, too."""
    while line := file.readline(LONGEST_LINE):
        if len(line) < LONGEST_LINE or line.endswith(b"\n"):
            # A line of JSON contains no carriage return, so one can only end a line.
            for piece in line.splitlines(keepends=True) if b"\r" in line else (line,):
                yield piece, len(piece)
            continue
        length = len(line)
        while not line.endswith(b"\n") and (line := file.readline(LONGEST_LINE)):
            length += len(line)
        yield None, length


def _parsed(line: bytes) -> dict[str, Any] | RowError:
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return RowError("not UTF-8", f"{str(error)[:200]}; {OTHER_ENCODING}")
    except (ValueError, RecursionError) as error:
        return RowError("broken JSON", str(error)[:200])
    return value if isinstance(value, dict) else RowError("broken JSON", f"a {type(value).__name__}, not an object")


def _read_array(path: str, start: Any, encoding: str | None) -> Iterator[Row]:
    number = 0
    with open_text(path, encoding) as text:
        try:
            for value in _Array(text):
                number += 1
                if number <= (start or 0):
                    continue
                entry = value if isinstance(value, dict) else RowError("broken JSON", "an entry that is not an object")
                yield Row(number, f"{file_name(path)}:{number}", entry)
        except (ValueError, RecursionError, OSError, EOFError) as error:
            problem = (
                ValueError(f"in entry {number + 1}: {error.msg}") if isinstance(error, json.JSONDecodeError) else error
            )
            yield Row(None, f"{file_name(path)}:{number + 1}", file_error(problem))


class _Array:
    """Iterates over the entries of a JSON array with only a piece in memory (ijson would stop at the first NaN)."""

    def __init__(self, text: Any) -> None:
        self.text = text
        self.held, self.at = "", 0

    def __iter__(self) -> Iterator[Any]:
        self._sign()  # the opening bracket
        if self._sign() == "]":
            sign = "]"
        else:
            self.at -= 1
            yield self._entry()
            while (sign := self._sign()) == ",":
                yield self._entry()
        if sign != "]":
            raise ValueError(
                f"{sign!r} where a comma or the end of the array should be" if sign else "no end of the array"
            )
        if rest := self._sign():
            raise ValueError(f"there is more after the end of the array: {rest!r}")

    def _more(self) -> bool:
        """Read more, twice as much each time, so that a long entry is not parsed too often."""
        piece = self.text.read(max(_CHUNK, len(self.held) - self.at))
        self.held, self.at = self.held[self.at :] + piece, 0
        return bool(piece)

    def _sign(self) -> str:
        """Take the next character that is not a space; an empty string at the end."""
        while True:
            match = _BLANK.match(self.held, self.at)
            self.at = match.end() if match else self.at
            if self.at < len(self.held):
                self.at += 1
                return self.held[self.at - 1]
            if not self._more():
                return ""

    def _entry(self) -> Any:
        """Take the next entry.

        Raises:
            ValueError: if the entry is not valid JSON, or does not end.
        """
        if self._sign():
            self.at -= 1
        while True:
            value, end, failed = None, -1, None
            try:
                value, end = _DECODER.raw_decode(self.held, self.at)
            except json.JSONDecodeError as error:
                failed = error
            if 0 <= end < len(self.held):
                self.at = end
                return value
            left = len(self.held) - self.at
            cut = failed is None or failed.msg.startswith("Unterminated") or failed.pos >= len(self.held) - 20
            if cut and left < LONGEST_LINE and self._more():
                continue
            raise failed or ValueError("no end of the array")
