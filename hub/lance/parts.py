"""Writes a table part by part: each whole or not at all, from any number of processes at once."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from bifocal.hub.lance.database import (
    ITEMS,
    PARTS,
    TABLES,
    connect,
    errors_as_search_errors,
    is_address,
    quoted,
    read_settings,
    require_same_settings,
    table_names,
    with_settings,
)
from bifocal.hub.lance.indexes import build_indexes
from bifocal.hub.search.captions import caption_name
from bifocal.hub.search.hits import SearchError

if TYPE_CHECKING:
    import pyarrow as pa

_ALL = 2**31 - 1  # rows of a query without a limit
_STARTED, _WRITTEN = "started", "written"
_PRECISIONS = ("float32", "float16")  # those that LanceDB searches with a query in float32


def require_database_precision(precision: str) -> None:
    """Check that LanceDB can search vectors of a precision.

    Raises:
        SearchError: if it cannot.
    """
    if precision not in _PRECISIONS:
        raise SearchError(
            f"A LanceDB database holds no vectors in {precision}. Choose --precision float32 or float16; an index of "
            "the database makes them smaller for a search."
        )


class _Settings(Protocol):
    """Settings of a run, as plain JSON."""

    def to_dict(self) -> dict[str, Any]: ...


class LanceParts:
    """A table in a LanceDB database, written in parts. It is pickled by its address, so that each process has its own.

    A row has the columns `key`, `kind`, `name`, `names`, `text`, `address`, `image`, `vector` and `weights`. Images are
    also found by their captions: `image_names` are the names of the images that a text is a caption of, `is_caption`
    says that there are some, and `is_text` that it is a text of its own; it may be both. `part` is the part that a row
    was written with.

    A part is one commit, before and after which a log says that the part was started and written. A part that was
    started and not written is deleted before it is written again, so that a killed run leaves no row twice.

    Args:
        uri: a folder, or an address that LanceDB knows (`s3://`, `gs://`, `az://`, `db://`).
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._tables: tuple[Any, Any] | None = None
        self._log_names: list[str] = []  # parts of the entries in the log, as far as they were read

    def __getstate__(self) -> dict[str, Any]:
        return {"uri": self.uri, "_tables": None, "_log_names": []}

    def recorded(self) -> dict[str, Any] | None:
        """Return the settings that the table was written with; None if there is no table.

        Raises:
            SearchError: if it was written by another version or program, or the address is wrong.
        """
        if not is_address(self.uri) and not Path(self.uri).expanduser().exists():
            return None
        with errors_as_search_errors(self.uri):
            database = connect(self.uri, quick=True)
            names = table_names(database)
            ours = [read_settings(database.open_table(name), self.uri) for name in TABLES if name in names]
            return ours[0] if ITEMS in names else None

    def start(self, settings: _Settings) -> None:
        """Create the table with these settings, or check that it was written with them.

        Args:
            settings: with `model`, `weights`, `dimensions`, `precision`, `dtype`, `query_prompt`, `fast_decoding`, and
                whatever else decides the rows.

        Raises:
            SearchError: if the table was written with other settings or by another program, or the address is wrong.
        """
        own = json.loads(json.dumps(settings.to_dict()))
        require_database_precision(own["precision"])
        if os.path.isdir(os.path.expanduser(own["model"])):  # searches start in other folders
            own["model"] = os.path.abspath(os.path.expanduser(own["model"]))
        recorded = self.recorded()
        if recorded is not None:
            require_same_settings(recorded, own, self.uri)
        with errors_as_search_errors(self.uri):
            database = connect(self.uri, create=True)
            names = table_names(database)
            for name, schema in ((PARTS, _log_schema()), (ITEMS, _schema(own["dimensions"], own["precision"]))):
                if name in names:
                    continue
                try:
                    database.create_table(name, schema=with_settings(schema, own))
                except ValueError as error:  # another process was faster
                    if "already exists" not in str(error):
                        raise
            require_same_settings(read_settings(database.open_table(ITEMS), self.uri), own, self.uri)

    def _open(self) -> tuple[Any, Any]:
        """Return the table of items and the log."""
        if self._tables is None:
            database = connect(self.uri)
            for name in (ITEMS, PARTS):
                if name not in table_names(database):
                    raise SearchError(f"There is no table '{name}' at '{self.uri}'. Run bifocal embed again.")
            self._tables = (database.open_table(ITEMS), database.open_table(PARTS))
        for table in self._tables:
            table.checkout_latest()
        return self._tables

    def written(self) -> dict[str, dict[str, Any]]:
        """Return the record of each part that was written completely, by name."""
        return {name: json.loads(entry["record"]) for name, entry in self._entries().items() if entry is not None}

    def count(self) -> int:
        """Return about how many parts were written: one that was started and killed counts half."""
        with errors_as_search_errors(self.uri):
            _, log = self._open()
            return log.count_rows() // 2  # known without reading the log, unlike the states

    def _entries(self) -> dict[str, dict[str, Any] | None]:
        """Return the last entry of each part in the log; None if it was not written completely."""
        entries: dict[str, dict[str, Any] | None] = {}
        with errors_as_search_errors(self.uri):
            _, log = self._open()
            for entry in log.to_arrow().to_pylist():  # in the order of its commits
                entries[entry["part"]] = entry if entry["state"] == _WRITTEN else None
        return entries

    def write(self, name: str, rows: "pa.Table", record: Mapping[str, Any]) -> None:
        """Write a part, whole or not at all, in place of one that was written or started under this name.

        Args:
            name: name of the part, which only one process writes at a time.
            rows: with `key`, `kind`, `name`, `text`, `address`, `image`, `vector` and `weights`. If `names`,
                `image_names` and `is_text` are missing, a row has one name, and captions are known by theirs.
            record: plain JSON values that `written` returns.

        Raises:
            SearchError: if the database cannot be written, or the rows do not fit it.
        """
        with errors_as_search_errors(self.uri):
            items, log = self._open()
            is_part = f"part = {quoted(name)}"
            if self._is_logged(log, name):
                items.delete(is_part)
            self._log(log, name, _STARTED)
            if len(rows):
                items.add(_to_items(rows, name, items.schema))
            self._log(log, name, _WRITTEN, len(rows), record)

    def _is_logged(self, log: Any, name: str) -> bool:
        """Return whether a part was started, by any process. Only what is new in the log is read."""
        for last in (max(0, len(self._log_names) - 1), 0):
            rows = log.search().select(["part"]).offset(last).limit(_ALL).to_arrow()
            entries = rows.column("part").to_pylist()
            if entries[:1] == self._log_names[last : last + 1] or last == 0:
                break  # otherwise another process has rewritten the log in another order
        del self._log_names[last:]
        self._log_names += entries
        return name in self._log_names

    def delete(self, names: Sequence[str]) -> None:
        """Delete parts with their rows."""
        with errors_as_search_errors(self.uri):
            items, log = self._open()
            for name in names:
                self._log(log, name, _STARTED)
                items.delete(f"part = {quoted(name)}")

    def finish(self) -> str:
        """Build the indexes of the table, or update them, and return what was done, in words.

        Rows of parts that were started and never written completely are deleted.

        Raises:
            SearchError: if a part does not have the rows that were written.
        """
        with errors_as_search_errors(self.uri):
            self._require_rows()
            items, log = self._open()
            log.optimize()
            return f"{build_indexes(connect(self.uri), items)}; the table is '{ITEMS}' in {self.uri}"

    def _require_rows(self) -> None:
        """Check the number of rows of each part, and let a part that has others be written again."""
        import pyarrow.compute as pc

        entries = self._entries()
        items, log = self._open()
        counts: dict[str, int] = {}
        for batch in items.search().select(["part"]).to_batches(65_536):
            for count in pc.value_counts(batch.column("part")).to_pylist():
                counts[count["values"]] = counts.get(count["values"], 0) + count["counts"]
        for name in counts:
            if entries.get(name) is None:  # of a killed run
                items.delete(f"part = {quoted(name)}")
        expected = {name: entry["rows"] for name, entry in entries.items() if entry is not None}
        wrong = sorted(name for name, rows in expected.items() if counts.get(name, 0) != rows)
        for name in wrong:
            self._log(log, name, _STARTED)
        if wrong:
            raise SearchError(
                f"Part '{wrong[0]}' at '{self.uri}' has {counts.get(wrong[0], 0)} rows, not {expected[wrong[0]]}, as "
                f"two runs at once leave it. Run the command again; it writes {len(wrong)} parts again."
            )

    def _log(self, log: Any, name: str, state: str, rows: int = 0, record: Mapping[str, Any] | None = None) -> None:
        import pyarrow as pa

        entry = {"part": name, "state": state, "rows": rows, "record": json.dumps(record or {})}
        log.add(pa.Table.from_pylist([entry], schema=_log_schema()))


def _schema(dimensions: int, precision: str) -> "pa.Schema":
    import pyarrow as pa

    text, number = pa.string(), {"float32": pa.float32(), "float16": pa.float16()}[precision]
    return pa.schema(
        [("key", text), ("kind", text), ("name", text), ("names", pa.list_(text)), ("text", text), ("address", text),
         ("image", pa.binary()), ("vector", pa.list_(number, dimensions)), ("weights", text),
         ("image_names", pa.list_(text)), ("is_caption", pa.bool_()), ("is_text", pa.bool_()), ("part", text)]
    )  # fmt: skip


def _log_schema() -> "pa.Schema":
    import pyarrow as pa

    return pa.schema([("part", pa.string()), ("state", pa.string()), ("rows", pa.int64()), ("record", pa.string())])


def _to_items(rows: "pa.Table", part: str, schema: "pa.Schema") -> "pa.Table":
    """Return rows with all columns of the table of items, in its types.

    Raises:
        SearchError: if a column is missing, or has another type.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    columns = {name: rows.column(name).combine_chunks() for name in rows.column_names if name in schema.names}
    if "names" not in columns:
        is_caption = pc.and_(pc.equal(columns["kind"], "text"), pc.ends_with(columns["name"], caption_name("")))
        columns["names"] = _lists(columns["name"], np.ones(len(rows), np.int32))
        images = columns["name"].filter(is_caption)
        images = pc.binary_slice(images.cast(pa.binary()), 0, -len(caption_name(""))).cast(pa.string())
        columns["image_names"] = _lists(images, is_caption.to_numpy(zero_copy_only=False))
        columns["is_text"] = pc.and_not(pc.equal(columns["kind"], "text"), is_caption)
    columns["is_caption"] = pc.greater(pc.list_value_length(columns["image_names"]), 0)
    columns["part"] = pa.array([part] * len(rows), pa.string())
    try:
        return pa.table([columns[name].cast(schema.field(name).type) for name in schema.names], schema=schema)
    except (KeyError, pa.ArrowException) as error:
        raise SearchError(f"The rows of part '{part}' do not fit the table ({error}).") from error


def _lists(values: "pa.Array", lengths: np.ndarray) -> "pa.Array":
    """Return a column of lists, given all their values and the length of each."""
    import pyarrow as pa

    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), values.cast(pa.string()))
