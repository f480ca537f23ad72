"""CSV and TSV: every line belongs to a row that is read, or to a bad row named by its first line.

`csv` alone silently loses rows if a quote never closes: all lines up to the next quote become one field. Here the row
with such a quote is bad, and reading continues in the next line. If a quote closes at the end of a field and encloses
what looks like rows, it may be one row or several: then each of its lines is bad.
"""

import csv
import re
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

from bifocal.data.skips import RowError
from bifocal.data.text_files import OTHER_ENCODING, FileError, Row, file_error, file_name, open_text, wrong_encoding

_LONGEST_ROW = 2**24  # characters
_FIELD_LIMIT = min(sys.maxsize, 2**31 - 1)  # what C's long holds everywhere; csv's own limit is 131,072 characters
_OTHERS = (";", "\t", "|", ",")
_SIGNS = {"\t": "tab", ",": "comma", ";": "semicolon", "|": "pipe"}
_CLOSING = re.compile('(?<!")"(?!")')
_QUOTED = re.compile('".*"')
_SURROGATE = re.compile(r"[\ud800-\udfff]")


def read_csv(
    path: str,
    start: Any = None,
    column_names: Sequence[str] = (),
    delimiter: str | None = None,
    quoting: str | None = None,
    encoding: str | None = None,
    tabs: bool = False,
) -> Iterator[Row]:
    """Yield the rows of a CSV or TSV file; blank lines are not rows. A position is the number of lines before it.

    Args:
        column_names: names of the columns, if the file has no line with them.
        delimiter: a comma if None, a tab with `tabs`.
        quoting: "minimal" or "all": quotes enclose fields, as `csv` reads them; "none": a quote is a character like
            others. None means "none" for tab-separated files. In others, quotes enclose fields, but the lines of a
            field that looks like rows are bad; a single line only if the line with the opening quote is a row, too.
        encoding: UTF-8 if None.

    Raises:
        FileError: if the file is in another encoding, or its first line has another delimiter or other quotes.
    """
    with open_text(path, encoding) as text:
        try:
            lines, records = _opened(text, delimiter or ("\t" if tabs else ","), quoting)
            names = list(column_names) or _header(records, delimiter is None)
            records.columns = len(names)
            after = start["line"] if start else 0
            lines.skip(after)
            records.doubt = tuple(start.get("doubt", (0, 0))) if start else (0, 0)
            for line, fields in records:
                position: dict[str, Any] = {"line": lines.number}
                if lines.number < records.doubt[1]:  # a resumed reader must know that the next lines are in doubt
                    position["doubt"] = list(records.doubt)
                name = f"{file_name(path)}:{line}"
                if isinstance(fields, RowError):
                    yield Row(position, name, fields)
                elif len(fields) != len(names):
                    if line == 1 and len(fields) == 1 and delimiter is None:
                        _require_delimiter(fields[0], records.delimiter)
                    yield Row(position, name, _miscounted(fields, names, records))
                else:
                    value = dict(zip(names, fields, strict=True))
                    value.pop("", None)  # a column without a name, such as pandas' index
                    yield Row(position, name, value)
        except UnicodeError as error:
            raise wrong_encoding(encoding, error) from error
        except (OSError, EOFError) as error:  # gzip raises EOFError if the file was cut
            yield Row(None, f"{file_name(path)}:{lines.number + 1}", file_error(error))


def header_of(
    path: str,
    column_names: Sequence[str] = (),
    delimiter: str | None = None,
    quoting: str | None = None,
    encoding: str | None = None,
    tabs: bool = False,
) -> list[str]:
    """Return the names in a file's first line; an empty list if `column_names` are set."""
    with open_text(path, encoding) as text:
        records = _opened(text, delimiter or ("\t" if tabs else ","), quoting)[1]
        return [] if column_names else _header(records, delimiter is None)


def _opened(text: Any, delimiter: str, quoting: str | None) -> "tuple[_Lines, _Records]":
    csv.field_size_limit(_FIELD_LIMIT)  # for the whole process, and others may have lowered it
    lines = _Lines(text)
    return lines, _Records(lines, delimiter, quoting)


def _header(records: "_Records", guessed: bool) -> list[str]:
    """Return the names of the columns; of two columns with one name, the second is `NAME.1`, as in pandas.

    Raises:
        FileError: if the first line has another delimiter, a quote that does not close, or is in another encoding.
    """
    _, fields = next(records, (0, []))
    if isinstance(fields, RowError):
        raise FileError(fields.cause, f"in the header: {fields.detail}")
    names: list[str] = []
    for field in fields:
        name, number = field.strip(), 0
        while name and name in names:
            number += 1
            name = f"{field.strip()}.{number}"
        names.append(name)
    if any(map(_SURROGATE.search, names)):
        raise FileError("not UTF-8", f"in the header: {names[:20]!r:.200}; {OTHER_ENCODING}")
    if len(names) == 1 and guessed:
        _require_delimiter(names[0], records.delimiter)
    if names and records.quoting == "none" and records.guessed and all(map(_QUOTED.fullmatch, names)):
        raise FileError(
            "quoted header", f"quotes enclose the names in its first line, {names!r:.200}; set quoting=minimal"
        )
    return names


def _require_delimiter(line: str, delimiter: str) -> None:
    """Require that the first line has the expected delimiter.

    Raises:
        FileError: if a line that is one field has other usual delimiters.
    """
    other = max(_OTHERS, key=line.count)
    if other != delimiter and other in line:
        shown = "'\\t'" if other == "\t" else f"'{other}'"
        raise FileError(
            "another delimiter",
            f"the first line, {line[:80]!r}, has a {_SIGNS[other]} where a {_SIGNS.get(delimiter, delimiter)} was "
            f"expected; set delimiter={shown}",
        )


def _miscounted(fields: list[str], names: list[str], records: "_Records") -> RowError:
    problem = f"{len(fields)} fields, but the file has {len(names)} columns"
    if records.quoting == "none" and any(field.startswith('"') for field in fields):
        problem += "; set quoting=minimal if quotes enclose fields here"
    return RowError("broken CSV", problem)


class _Lines:
    """The lines of a text, counted; the last ones taken can be put back.

    Attributes:
        number: lines taken so far.
        taken: the lines of the current record.
        ended: whether the end of the file, or its own length, ended the current record.
    """

    def __init__(self, text: Any) -> None:
        self.text = text
        self.number = 0
        self.begin()
        self.back: deque[str] = deque()

    def begin(self) -> None:
        self.taken: list[str] = []
        self.size, self.ended = 0, False

    def skip(self, number: int) -> None:
        """Skip lines up to the one with this number."""
        while self.number < number and self._line():
            self.number += 1

    def put_back(self, keep: int) -> None:
        """Take only the first lines of the current record."""
        self.back.extendleft(reversed(self.taken[keep:]))
        self.number -= len(self.taken) - keep
        del self.taken[keep:]

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        line = "" if self.size > _LONGEST_ROW else self._line()
        if not line:
            self.ended = True
            raise StopIteration
        self.number += 1
        self.size += len(line)
        self.taken.append(line)
        return line

    def _line(self) -> str:
        if self.back:
            return self.back.popleft()
        line = rest = self.text.readline(_LONGEST_ROW)
        while len(rest) == _LONGEST_ROW and not rest.endswith(("\n", "\r")):  # one line that is too long to be a row
            rest = self.text.readline(_LONGEST_ROW)
        return line


class _Records:
    """Iterates over records: the first line's number, and the fields or a `RowError`.

    Attributes:
        doubt: first and last line of a record that may be one row or several.
    """

    def __init__(self, lines: _Lines, delimiter: str, quoting: str | None) -> None:
        self.lines = lines
        self.delimiter = delimiter
        self.quoting = quoting or ("none" if delimiter == "\t" else None)
        self.guessed = quoting is None
        self.columns = 0
        self.doubt: tuple[int, ...] = (0, 0)
        self.options: Any = {
            "delimiter": delimiter, "quoting": csv.QUOTE_NONE if self.quoting == "none" else csv.QUOTE_MINIMAL,
        }  # fmt: skip
        self.reader = csv.reader(lines, **self.options)

    def __iter__(self) -> "_Records":
        return self

    def __next__(self) -> tuple[int, list[str] | RowError]:
        while True:
            self.lines.begin()
            line = self.lines.number + 1
            if line <= self.doubt[1]:
                return line, self._doubtful(next(self.lines))
            record: list[str] | RowError
            try:
                record = next(self.reader)
            except csv.Error as error:
                record = RowError("broken CSV", str(error))
            if not isinstance(record, RowError):
                record = self._believed(record)
            if isinstance(record, RowError):
                self.lines.put_back(1)
                return line, record
            blank = not record or (len(record) == 1 != self.columns and not record[0].strip())
            if not blank:
                return line, record

    def _believed(self, record: list[str]) -> list[str] | RowError:
        """Return the record, or the error of its first line if its quote is not meant to enclose the others."""
        taken = self.lines.taken
        if len(taken) == 1 and self.lines.size >= _LONGEST_ROW:
            return RowError("row too long", f"more than {_LONGEST_ROW:,} characters")
        remedy = "correct it, or set quoting=none if quotes are part of the texts"
        if self.lines.ended:
            where = "the end of the file" if self.lines.size <= _LONGEST_ROW else f"{self.lines.size:,} characters"
            problem = f"its quote does not close before {where}"
        elif len(taken) > 1 and self.quoting is None and not self._strict(taken):
            problem = f"its quote closes {len(taken) - 1} lines later, in the middle of a text"
        elif len(taken) > 1 and self.quoting is None and self._encloses_rows():
            if len(record) == self.columns:
                self.doubt = (self.lines.number - len(taken) + 1, self.lines.number)
                return self._doubtful(taken[0])
            problem = f"its quote encloses {len(taken) - 1} lines that look like rows"
            remedy += ", or quoting=minimal if the lines are one field"
        else:
            return record
        return RowError("open quote", f"{problem}, in {taken[0].strip()[:100]!r}; {remedy}")

    def _doubtful(self, line: str) -> RowError:
        first, last = self.doubt
        return RowError(
            "ambiguous quote",
            f"a quote encloses what looks like rows, from line {first} to {last}, here {line.strip()[:100]!r}; set "
            "quoting=minimal if it is one field, or quoting=none if quotes are part of the texts",
        )

    def _strict(self, taken: list[str]) -> bool:
        """Return whether a delimiter or the end of the line follows each closing quote."""
        try:
            next(csv.reader(iter(taken), strict=True, **self.options))
        except csv.Error:
            return False
        return True

    def _encloses_rows(self) -> bool:
        """Return whether the lines after the first one have as many fields as the file has columns.

        Prose may have as many commas, but a space follows them, and hardly every line has them. A single line counts
        only if the first line is a row, too, which it is not if a text of two lines comes before other fields.
        """
        first, *inner, last = (line.rstrip("\r\n") for line in self.lines.taken)
        columns = self.columns or len(first.split(self.delimiter))
        # Each line as it is without the quote that opens, or closes, in it.
        opened = first[::-1].replace('"', "", 1)[::-1]
        inside = [*inner, _CLOSING.sub("", last, count=1)]
        alike = sum(map(self._is_row, inside))
        return columns > 1 and alike >= max(1 if self._is_row(opened) else 2, 0.8 * len(inside))

    def _is_row(self, line: str) -> bool:
        try:
            fields = next(csv.reader([line], **self.options), [])
        except csv.Error:
            return False
        columns = self.columns or len(self.lines.taken[0].split(self.delimiter))
        return len(fields) == columns and not any(field.startswith(" ") for field in fields[1:])
