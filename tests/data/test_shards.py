"""Streams of files: every row once whatever the numbers of files and readers, and found again where they stood."""

import json
import tracemalloc
from collections import Counter

import numpy as np
import pytest

from bifocal.data.loading import open_stream
from bifocal.data.readers import Row
from bifocal.data.shards import ShardStream
from bifocal.data.skips import RowError
from bifocal.data.source import Source
from bifocal.training.streams import BlockReader
from bifocal.training.tasks import Task
from tests.data.files import lines, shards

BLOCK = 1024
OPENED: Counter = Counter()


def numbered(path: str, start=None):
    """The rows of a simulated file `NUMBER/COUNT`."""
    OPENED[path] += 1
    number, count = map(int, path.split("-"))
    for row in range(start or 0, count):
        name = f"{number}:{row}"
        yield Row(row + 1, name, RowError("odd one") if row % 11 == 10 else {"query": name, "positive": "p"})


def simulated(counts: list[int], seed: int | None = 0) -> ShardStream:
    files = [f"{number}-{count}" for number, count in enumerate(counts)]
    return ShardStream(files, numbered, lambda name, raw: raw, "text-pair", seed)


def epoch_of(stream: ShardStream, number: int, count: int, epoch: int = 0, size: int = 7) -> list[str]:
    """Names of all rows, good and bad, of one part in one epoch."""
    part = stream.part(number, count)
    part.open(epoch)
    names: list[str] = []
    while (block := part.next(size)) is not None:
        assert block.rows <= size
        names += block.names + [skip.row for skip in block.skips]
    return names


@pytest.mark.parametrize("seed", range(40))
def test_readers_together_see_every_row_once(seed):
    """Random numbers of files (empty ones too), of rows in them, of processes and of workers."""
    draw = np.random.default_rng(seed)
    counts = [int(n) for n in draw.integers(0, 30, draw.integers(1, 25))]
    readers = int(draw.integers(1, 9) * draw.integers(1, 5))
    stream = simulated(counts, seed)
    expected = Counter(f"{number}:{row}" for number, count in enumerate(counts) for row in range(count))
    for epoch in (0, 3):
        OPENED.clear()
        seen = Counter(name for reader in range(readers) for name in epoch_of(stream, reader, readers, epoch))
        assert seen == expected
        if len(counts) >= readers:
            assert set(OPENED.values()) == {1}, "no file is loaded by two readers"


def test_files_come_in_a_new_order_each_epoch():
    stream = simulated([3] * 20)
    first, second = (epoch_of(stream, 0, 1, epoch) for epoch in (0, 1))
    assert sorted(first) == sorted(second)
    assert first != second
    assert epoch_of(simulated([3] * 20, seed=None), 0, 1) == [f"{n}:{row}" for n in range(20) for row in range(3)]


@pytest.mark.parametrize("used", [0, 1, 6, BLOCK - 1, BLOCK, BLOCK + 1, 1500, 2049, 2200, 5000])
@pytest.mark.parametrize(("readers", "counts"), [(1, [900, 700, 500]), (5, [3000, 2500, 4000])])
def test_a_reader_continues_with_unseen_rows(used, readers, counts):
    """From any place, in mid-file and mid-block, also where readers share a file."""
    task = Task("t", "text-pair", simulated(counts), 1)
    whole = BlockReader(task, 5, readers - 1, readers)
    if used:
        whole.take(used)
    state = json.loads(json.dumps(whole.state()))
    again = BlockReader(task, 5, readers - 1, readers)
    again.load_state(state)
    whole.report()
    for count in (3, 500, 2000):
        assert again.take(count) == whole.take(count)
        assert again.report() == whole.report(), "and skipped rows are counted once"


@pytest.mark.parametrize("layout", ["tar", "tar.gz", "jsonl", "jsonl.gz", "csv", "parquet", "json"])
def test_positions_in_real_files(tmp_path, layout):
    """Reading on from every position of a file gives the rows after it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from tests.data.files import shard

    path = tmp_path / f"a.{layout}"
    rows = [{"query": f"q {n}", "positive": f"p\n{n}"} for n in range(20)]
    if "tar" in layout:
        shard(path, 0, 5)
    elif "jsonl" in layout:
        lines(path, rows)
    elif layout == "json":
        path.write_text(json.dumps(rows))
    elif layout == "csv":
        path.write_text("query,positive\n" + "".join(f'{row["query"]},"{row["positive"]}"\n' for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=6)
    read = open_stream(Source(path=str(path)), "image-text" if "tar" in layout else "text-pair").read
    found = list(read(str(path), None))
    assert len(found) == (5 if "tar" in layout else 20)
    for number, row in enumerate(found):
        assert list(read(str(path), json.loads(json.dumps(row.position)))) == found[number + 1 :]


def test_ten_thousand_files_cost_no_more_than_a_hundred():
    """Memory and start-up: one file is opened for the first rows, and what a reader keeps does not grow with them."""
    kept = {}
    for count in (100, 10_000):
        stream = simulated([200] * count)
        OPENED.clear()
        tracemalloc.start()
        readers = [BlockReader(Task("t", "text-pair", stream, 1), 0, number, 64) for number in range(64)]
        for reader in readers[:8]:
            reader.take(5)
        kept[count] = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        # A block of 1,024 rows takes files of 200 rows as they come; none is opened before its turn.
        assert OPENED.total() <= 8 * 6
        assert len(json.dumps(readers[0].state())) < 300
    assert kept[10_000] < kept[100] + 2 * 2**20, kept


def test_a_pattern_of_ten_thousand_is_not_looked_at(tmp_path):
    """Nor is a file: only the first is there, and only it is read."""
    shards(tmp_path, [4])
    stream = open_stream(Source(path=f"{tmp_path}/{{00000..09999}}.tar", streaming=True), "image-text")
    assert len(stream.shards) == 10_000
    part = ShardStream(stream.shards, stream.read, stream.normalise, "image-text", None).part(0, 1)
    part.open(0)
    assert part.next(4).names == [f"00000.tar/{n:06}" for n in range(4)]


def test_a_block_ends_where_its_images_are_many(monkeypatch):
    monkeypatch.setattr("bifocal.data.shards._BLOCK_BYTES", 1000)

    def heavy(path, start=None):
        for row in range(start or 0, 10):
            yield Row(row + 1, str(row), {"image": b"x" * 300, "caption": "c", "image_id": "i"})

    part = ShardStream(["a"], heavy, lambda name, raw: raw, "image-text").part(0, 1)
    part.open(0)
    sizes = []
    while (block := part.next(BLOCK)) is not None:
        sizes.append(block.rows)
    assert sizes == [4, 4, 2] or sizes == [4, 4, 2, 0]
