"""Read tar shards (webdataset): members that share a name up to its first dot are a sample."""

import json
import os
import tarfile
from collections.abc import Iterator
from typing import Any, BinaryIO

from bifocal.data.paths import open_file
from bifocal.data.readers import IMAGE_SUFFIXES
from bifocal.data.skips import RowError
from bifocal.data.text_files import Row, file_error, file_name

_LARGEST = 256 * 2**20  # bytes of a member


def read_tar(path: str, start: Any = None) -> Iterator[Row]:
    """Yield the samples of a shard; a position is the byte of the next sample's first header.

    A sample's columns are the suffixes of its members: images as bytes under `image`, texts as strings, and the fields
    of its JSON under `json`. Links, and names that lead out of the shard (`../`), make a bad row; nothing is written.
    """
    with open_file(path) as file:
        file.seek(start or 0)
        key: str | None = None
        sample: dict[str, Any] = {}
        row_error: RowError | None = None
        try:
            tar: Any = tarfile.TarFile(fileobj=file)
            while (member := tar.next()) is not None:
                tar.members = []  # or it would keep every member of the shard in memory
                if member.isdir():
                    continue
                this, ending = _split(member.name)
                if key is not None and this != key:
                    yield Row(member.offset, f"{file_name(path)}/{key}", row_error or sample)
                    sample, row_error = {}, None
                key = this
                try:
                    _add(sample, ending, member, tar)
                except RowError as error:
                    row_error = error
            _require_end(file, tar.offset)
        except (tarfile.TarError, OSError, EOFError) as error:
            # Members of the current sample may be missing: it is lost with the rest.
            yield Row(None, f"{file_name(path)}/{key or 0}", file_error(error))
            return
        if key is not None:
            yield Row(tar.offset, f"{file_name(path)}/{key}", row_error or sample)


def _split(name: str) -> tuple[str, str]:
    folder, slash, file = name.rpartition("/")
    stem, _, ending = file.partition(".")
    return folder + slash + stem, ending.lower()


def _add(sample: dict[str, Any], ending: str, member: tarfile.TarInfo, tar: tarfile.TarFile) -> None:
    if os.path.isabs(member.name) or ".." in member.name.split("/"):
        raise RowError("path out of the shard", member.name[:200])
    if not member.isreg():
        raise RowError("link in the shard", member.name[:200])
    if member.size > _LARGEST:
        raise RowError("member too large", f"{member.name[:200]} has {member.size:,} bytes")
    file = tar.extractfile(member)
    assert file is not None
    content = file.read()
    if len(content) < member.size:
        raise tarfile.ReadError("unexpected end of data")
    if ending in IMAGE_SUFFIXES:
        sample["image"] = content
        return
    if ending == "json":
        try:
            sample["json"] = json.loads(content.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            raise RowError("not UTF-8", f"{member.name[:200]}: {error}") from error
        except (ValueError, RecursionError) as error:
            raise RowError("broken JSON", f"{member.name[:200]}: {error}") from error
        return
    try:
        sample[ending] = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if ending in ("txt", "text", "caption"):
            raise RowError("not UTF-8", f"{member.name[:200]}: {error}") from error
        sample[ending] = content


def _require_end(file: BinaryIO, offset: int) -> None:
    """Require the end of the archive; tarfile stops silently at a broken header and at a cut between two members."""
    file.seek(offset)
    block = file.read(tarfile.BLOCKSIZE)
    if block.count(b"\0") == tarfile.BLOCKSIZE:
        return
    raise tarfile.ReadError("no end of archive" if not block else f"a broken header at byte {offset:,}")
