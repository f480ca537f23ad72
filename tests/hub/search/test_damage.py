"""A damaged index: one sentence with the file and what to do, or what is derived is rebuilt; never a wrong number."""

import gc
import json
import os
import shutil
import subprocess
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from bifocal.embedding.items import Item
from bifocal.embedding.models import weights_hash
from bifocal.hub.search.hits import SearchError
from bifocal.hub.search.index import SearchIndex
from bifocal.hub.search.searcher import Searcher
from tests.bifocal.commands import error_of, invoke
from tests.hub.search.conftest import sample_items


@pytest.fixture(scope="module")
def intact(model_folder, tmp_path_factory) -> Path:
    """An index of three parts, which nobody changes."""
    from bifocal.hub.search import ingestion as module

    folder = tmp_path_factory.mktemp("intact") / "index"
    made = SearchIndex.create(folder, str(model_folder), weights_hash(model_folder), 40)
    rows, module.ROWS = module.ROWS, 50
    try:
        Searcher(made).add(sample_items())
    finally:
        module.ROWS = rows
    assert len(made.table.parts) == 3
    return folder


@pytest.fixture
def folder(intact, tmp_path) -> Path:
    return Path(shutil.copytree(intact, tmp_path / "index"))


def part(folder: Path, number: int = 1) -> Path:
    return folder / "table" / f"part-{number:06d}.arrow"


def cut(folder: Path) -> None:
    part(folder).write_bytes(part(folder).read_bytes()[:-300])


def cut_at_a_message(folder: Path) -> None:
    """What is left is complete except for the end mark."""
    part(folder).write_bytes(part(folder).read_bytes()[:-8])


def other_numbers(folder: Path) -> None:
    """A block of the embeddings is overwritten, which no structure of the file shows."""
    content = bytearray(part(folder).read_bytes())
    table = pa.ipc.open_stream(bytes(content)).read_all()
    first = table.column("embedding").chunk(0).values.to_numpy()[:40].tobytes()
    at = bytes(content).index(first)
    content[at : at + 64] = os.urandom(64)
    part(folder).write_bytes(content)


def other_offsets(folder: Path) -> None:
    table = pa.ipc.open_stream(part(folder).read_bytes()).read_all()
    content = part(folder).read_bytes()
    offsets = table.column("key").chunk(0).buffers()[1].to_pybytes()[:200]
    at = content.index(offsets)
    part(folder).write_bytes(content[:at] + b"\x7f" * 200 + content[at + 200 :])


def other_dimensions(folder: Path) -> None:
    from bifocal.hub.search.table import Table

    part(folder).unlink()
    Table(folder / "table", 16).fill(part(folder).name)


def other_columns(folder: Path) -> None:
    with pa.OSFile(str(part(folder)), "wb") as sink, pa.ipc.new_stream(sink, pa.schema([("a", pa.int32())])):
        pass


DAMAGED = [cut, cut_at_a_message, other_numbers, other_offsets, other_dimensions, other_columns]


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_part_is_named(folder, damage):
    damage(folder)
    shutil.rmtree(folder / "faiss")
    with pytest.raises(SearchError, match=r"part-000001.arrow' .*run bifocal index again") as raised:
        SearchIndex(folder).search(np.ones(40))
    assert "\n" not in str(raised.value)


def test_every_command_says_so(folder):
    part(folder).write_bytes(b"no arrow")
    (folder.parent / "texts.jsonl").write_text('{"text": "one"}\n')
    for command in (
        ["search", "index", "a star"], ["remove", "index", "*"], ["export-lancedb", "index", "lance"],
        ["serve", "index"], ["serve", "index", "--space", "space"], ["index", "texts.jsonl", "index"],
    ):  # fmt: skip
        assert "part-000001.arrow' is damaged: its end is missing. Delete this" in error_of(folder.parent, *command)
    assert not (folder.parent / "space").exists()


@pytest.mark.parametrize("number", [1, 2])
def test_a_lost_part_is_missed_and_made_again(folder, number):
    whole = {hit.name: hit.score for hit in Searcher(SearchIndex(folder)).search("a red star", k=200)}
    part(folder, number).unlink()
    with pytest.raises(SearchError, match=rf"part-00000{number}.arrow' is missing. Put it back, or run bifocal index"):
        Searcher(SearchIndex(folder)).search("a red star")
    added = Searcher(SearchIndex(folder)).add(sample_items())
    assert (added.restored, added.new + added.known) == (1, 128)
    again = {hit.name: hit.score for hit in Searcher(SearchIndex(folder)).search("a red star", k=200)}
    assert again == pytest.approx(whole, abs=1e-5)


@pytest.mark.parametrize(
    "content",
    [b"", b"garbage", b"\x00\xff", b"[]", b"{}", b'{"format": 3}', b'{"format": 2}',
     b'{"format": 3, "model": "m", "weights": "w", "dimensions": 40, "parts": 1, "sources": [], "variants": [["a"]]}'],
)  # fmt: skip
def test_damaged_settings_are_named(folder, content):
    (folder / "index.json").write_bytes(content)
    with pytest.raises(SearchError, match=r"index.json' is damaged|made by another version of Bifocal. Index again"):
        SearchIndex(folder)
    (folder / "index.json").unlink()
    with pytest.raises(SearchError, match="is not an index"):
        SearchIndex(folder)


@pytest.mark.parametrize("content", ["cut", "garbage", "numbers"])
def test_a_damaged_faiss_file_is_rebuilt(folder, content):
    before = [hit.name for hit in Searcher(SearchIndex(folder)).search("a red star", k=5)]
    (file,) = (folder / "faiss").glob("*.faiss")
    whole = file.read_bytes()
    damaged = {"cut": whole[:-100], "garbage": os.urandom(len(whole)), "numbers": whole[:-64] + os.urandom(64)}
    file.write_bytes(damaged[content])
    (folder / "faiss" / ".40-float32.x.faiss.1-2").write_bytes(b"of a killed run")
    assert [hit.name for hit in Searcher(SearchIndex(folder)).search("a red star", k=5)] == before
    assert [path.read_bytes() for path in (folder / "faiss").glob("*.faiss")] == [whole]
    backups = {"40-float32.backup.faiss", ".40-float32.mine.faiss.old-copy"}
    for name in backups:
        (folder / "faiss" / name).write_bytes(b"the user's")
    Searcher(SearchIndex(folder)).add([Item("new", "a new text")])
    left = {path.name for path in (folder / "faiss").iterdir()} - backups
    assert len(left) == 1, "what was made of an earlier table is deleted"
    assert all((folder / "faiss" / name).exists() for name in backups), "but nothing by other names"


def test_foreign_files_are_left_alone(folder):
    foreign = [folder / "table" / name for name in ("part-copy.arrow", "notes.txt", ".mine")]
    for path in foreign:
        path.write_text("mine")
    (folder / ".lock").touch()
    Searcher(SearchIndex(folder)).add([Item("new", "a new text")])
    assert SearchIndex(folder).remove(["new"]) == 1
    assert all(path.read_text() == "mine" for path in foreign)


def test_thumbnails_do_not_get_worse(folder):
    before = dict(zip(*(SearchIndex(folder).snapshot().rows[name].to_pylist() for name in ("key", "image"))))
    assert SearchIndex(folder).remove(["drawings/1*"]) == 11
    after = dict(zip(*(SearchIndex(folder).snapshot().rows[name].to_pylist() for name in ("key", "image"))))
    assert len(after) == 117
    assert all(before[key] == image for key, image in after.items())


def test_searching_needs_no_right_to_write(intact, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(disk)], capture_output=True, check=False).returncode:
        pytest.skip("mounting a file system needs root")
    try:
        shutil.copytree(intact, disk / "index", ignore=shutil.ignore_patterns("faiss", ".lock"))
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        done = invoke(disk, "search", "index", "a red star", "--json")
        assert done.exit_code == 0, done.stderr
        assert len(json.loads(done.stdout)) == 10
        assert "Cannot write to index" in error_of(disk, "remove", "index", "drawings/1.png")
    finally:
        gc.collect()  # what still maps a file of the index would keep the disk busy
        subprocess.run(["umount", str(disk)], check=True)


def test_searches_while_another_writes(folder):
    """Each search sees one state of the table, whole."""
    wrong: list[object] = []
    ended = threading.Event()
    writer, reader = Searcher(SearchIndex(folder)), Searcher(SearchIndex(folder))
    vector = reader.vector("a red star")
    truth = {hit.name: hit.score for hit in reader.index.search(vector, 200)}

    def write() -> None:
        for number in range(12):
            writer.add([Item(f"text {number}", f"another text {number}")])
            writer.index.remove([f"text {number}", f"drawings/{number}.png"])
        ended.set()

    def read() -> None:
        while not ended.is_set():
            try:
                found = SearchIndex(folder).search(vector, 200)
            except Exception as error:
                wrong.append(error)
                return
            known = [hit for hit in found if hit.name in truth]
            wrong.extend(hit for hit in known if abs(hit.score - truth[hit.name]) > 1e-5)
            if not 116 <= len(known) <= 128:
                wrong.append(len(known))

    threads = [threading.Thread(target=task) for task in (write, read, read)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert len(SearchIndex(folder)) == 116


def test_a_file_named_like_the_lock_is_left_alone(tmp_path):
    from bifocal.hub.search.hits import SearchError
    from bifocal.hub.search.lock import LOCK, index_lock

    (tmp_path / LOCK).write_text("mine")
    with pytest.raises(SearchError, match="is not Bifocal's, whose lock is an empty file"), index_lock(tmp_path):
        pytest.fail("it is locked")
    assert (tmp_path / LOCK).read_text() == "mine"
