"""Samples in tar shards: members that share a name up to its first dot (webdataset; LAION's jpg, txt and json)."""

import json
import os
import tarfile
from collections.abc import Iterator
from typing import Any, BinaryIO

from bifocal.data.paths import open_file
from bifocal.data.readers import PICTURES
from bifocal.data.skips import Fault
from bifocal.data.text_files import Row, lost, short

_LARGEST = 256 * 2**20  # bytes of a member


def read_tar(path: str, start: Any = None) -> Iterator[Row]:
    """The samples of a shard. A position is the place of the next sample's first header, in bytes.

    A sample's columns are the endings of its members: pictures as bytes under `image`, texts as strings, and the fields
    of its JSON under `json`. Links, and names that lead out of the shard (`../`), are faults; nothing is ever written.
    """
    with open_file(path) as file:
        file.seek(start or 0)
        key: str | None = None
        sample: dict[str, Any] = {}
        fault: Fault | None = None
        try:
            tar: Any = tarfile.TarFile(fileobj=file)
            while (member := tar.next()) is not None:
                tar.members = []  # or it would remember every member of the shard
                if member.isdir():
                    continue
                this, ending = _split(member.name)
                if key is not None and this != key:
                    yield Row(member.offset, f"{short(path)}/{key}", fault or sample)
                    sample, fault = {}, None
                key = this
                try:
                    _add(sample, ending, member, tar)
                except Fault as found:
                    fault = found
            _require_end(file, tar.offset)
        except (tarfile.TarError, OSError, EOFError) as error:
            # The sample at hand may lack members: it is lost with what follows.
            yield Row(None, f"{short(path)}/{key or 0}", lost(error))
            return
        if key is not None:
            yield Row(tar.offset, f"{short(path)}/{key}", fault or sample)


def _split(name: str) -> tuple[str, str]:
    folder, slash, file = name.rpartition("/")
    stem, _, ending = file.partition(".")
    return folder + slash + stem, ending.lower()


def _add(sample: dict[str, Any], ending: str, member: tarfile.TarInfo, tar: tarfile.TarFile) -> None:
    if os.path.isabs(member.name) or ".." in member.name.split("/"):
        raise Fault("path out of the shard", member.name[:200])
    if not member.isreg():
        raise Fault("link in the shard", member.name[:200])
    if member.size > _LARGEST:
        raise Fault("member too large", f"{member.name[:200]} has {member.size:,} bytes")
    file = tar.extractfile(member)
    assert file is not None
    content = file.read()
    if len(content) < member.size:
        raise tarfile.ReadError("unexpected end of data")
    if ending in PICTURES:
        sample["image"] = content
        return
    if ending == "json":
        try:
            sample["json"] = json.loads(content.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            raise Fault("not UTF-8", f"{member.name[:200]}: {error}") from error
        except (ValueError, RecursionError) as error:
            raise Fault("broken JSON", f"{member.name[:200]}: {error}") from error
        return
    try:
        sample[ending] = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if ending in ("txt", "text", "caption"):
            raise Fault("not UTF-8", f"{member.name[:200]}: {error}") from error
        sample[ending] = content


def _require_end(file: BinaryIO, offset: int) -> None:
    """tarfile ends in silence at a header it cannot read, and where a shard was cut between two members."""
    file.seek(offset)
    block = file.read(tarfile.BLOCKSIZE)
    if block.count(b"\0") == tarfile.BLOCKSIZE:
        return
    raise tarfile.ReadError("no end of archive" if not block else f"a broken header at byte {offset:,}")
