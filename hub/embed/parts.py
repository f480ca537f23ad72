"""Parts of a table as Parquet files, in a folder or in an object store."""

import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from bifocal.errors import first_line
from bifocal.files import replace_file
from bifocal.hub.embed.arguments import SETTINGS, EmbedError, require_table_or_nothing
from bifocal.hub.embed.settings import RunSettings

_PART = re.compile(r"part-\d{5,}-\d{6,}\.parquet")
_METADATA = b"bifocal"
_READERS = 8


class PartWriter(Protocol):
    """Where a run's parts are written. Picklable, since each process of a run writes its own parts."""

    def recorded(self) -> dict[str, Any] | None:
        """Return the settings of what is there; None if nothing is.

        Raises:
            BifocalError: if something else is there.
        """

    def start(self, settings: RunSettings) -> None:
        """Record the settings of a run, or check that they are those of what is there.

        Raises:
            BifocalError: if something else is there.
        """

    def written(self) -> dict[str, dict[str, Any]]:
        """Return the record of each part that was written, by name."""

    def count(self) -> int:
        """Return how many parts were written."""

    def write(self, name: str, rows: pa.Table, record: dict[str, Any]) -> None:
        """Write a part, whole or not at all."""

    def finish(self) -> str:
        """Complete the table after all parts are written, and return what was done, in words."""


class ParquetParts:
    """Parquet files `part-SPLIT-NUMBER.parquet` and `_embed.json`, the settings.

    Args:
        address: a folder, or an address that pyarrow knows (`s3://`, `gs://`). After `?` stand options of its file
            system, such as `endpoint_override` and `scheme`.
    """

    def __init__(self, address: str) -> None:
        self.address = address

    def _open(self) -> tuple[fs.FileSystem, str]:
        if "://" not in self.address:
            return fs.LocalFileSystem(), str(Path(self.address).expanduser())
        try:
            return fs.FileSystem.from_uri(self.address)
        except (pa.ArrowInvalid, OSError) as error:
            raise EmbedError(f"'{self.address}' cannot be used ({first_line(error)}). Check the address.") from error

    def recorded(self) -> dict[str, Any] | None:
        """Return the settings of what is there; None if nothing is.

        Raises:
            EmbedError: if there are other files, or the settings are damaged.
        """
        system, folder = self._open()
        files = self._files(system, folder)
        require_table_or_nothing(self.address, files)
        if SETTINGS not in files:
            return None
        try:
            recorded = json.loads(self._read(system, f"{folder}/{SETTINGS}"))
            recorded["format"]
        except (ValueError, KeyError, TypeError) as error:
            raise EmbedError(f"'{self.address}/{SETTINGS}' is damaged. Choose another address.") from error
        return recorded

    def start(self, settings: RunSettings) -> None:
        """Record the settings of a run, or check that they are those of what is there.

        Raises:
            EmbedError: if there are other files, or parts with other settings.
        """
        recorded = self.recorded()
        if recorded is not None and self.count():  # a run that wrote nothing may be corrected
            settings.require_same(recorded, self.address)
            return
        system, folder = self._open()
        content = json.dumps(settings.to_dict(), indent=2).encode() + b"\n"
        if isinstance(system, fs.LocalFileSystem):
            Path(folder).mkdir(parents=True, exist_ok=True)
            with replace_file(Path(folder) / SETTINGS) as scratch:
                scratch.write_bytes(content)
        else:
            self._upload(system, f"{folder}/{SETTINGS}", content)

    def _files(self, system: fs.FileSystem, folder: str) -> list[str]:
        try:
            entries = system.get_file_info(fs.FileSelector(folder, allow_not_found=True))
        except NotADirectoryError as error:
            raise EmbedError(f"'{self.address}' is a file. Choose a new or empty folder.") from error
        except OSError as error:
            raise EmbedError(f"'{self.address}' cannot be read ({first_line(error)[:160]}).") from error
        return [entry.base_name for entry in entries]

    def _read(self, system: fs.FileSystem, path: str) -> bytes:
        with system.open_input_file(path) as file:
            return file.read()

    def names(self) -> list[str]:
        """Return the names of the parts that were written."""
        system, folder = self._open()
        return sorted(name.removesuffix(".parquet") for name in self._files(system, folder) if _PART.fullmatch(name))

    def count(self) -> int:
        """Return how many parts were written."""
        return len(self.names())

    def written(self) -> dict[str, dict[str, Any]]:
        """Return the record of each part that was written, by name.

        Raises:
            EmbedError: if a part is damaged.
        """
        system, folder = self._open()

        def record(name: str) -> dict[str, Any]:
            path = f"{folder}/{name}.parquet"
            try:
                with system.open_input_file(path) as file:
                    return json.loads(pq.read_schema(file).metadata[_METADATA])
            except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
                raise EmbedError(
                    f"'{path}' is damaged ({first_line(error)[:120]}). Delete this file and run the command again."
                ) from error

        names = self.names()
        with ThreadPoolExecutor(_READERS) as pool:  # of an object store, each is a request
            return dict(zip(names, pool.map(record, names), strict=True))

    def write(self, name: str, rows: pa.Table, record: dict[str, Any]) -> None:
        """Write a part, whole or not at all."""
        system, folder = self._open()
        content = json.dumps(record)
        table = rows.replace_schema_metadata({_METADATA: content.encode()})
        if isinstance(system, fs.LocalFileSystem):
            with replace_file(Path(folder) / f"{name}.parquet") as scratch:
                pq.write_table(table, scratch, compression="zstd")
        else:  # an object appears when its upload is complete
            buffer = pa.BufferOutputStream()
            pq.write_table(table, buffer, compression="zstd")
            self._upload(system, f"{folder}/{name}.parquet", buffer.getvalue())

    def _upload(self, system: fs.FileSystem, path: str, content: Any) -> None:
        try:
            with system.open_output_stream(path) as stream:
                stream.write(content)
        except OSError as error:
            raise EmbedError(
                f"'{self.address}' cannot be written ({first_line(error)[:160]}). Check address and permissions."
            ) from error

    def finish(self) -> str:
        """Return where the table is; every part is complete by itself."""
        return f"the table is in {self.address}"
