"""Readers of streams: every row once, split without overlap, and found again where they stood."""

import json
from collections import Counter
from pathlib import Path

import pytest
from datasets import Dataset

from bifocal.training.streams import BlockReader
from bifocal.training.tasks import Task
from tests.data.files import shards
from tests.processes import run_ranks


def task(rows: int, shards: int) -> Task:
    data = Dataset.from_dict({"query": [f"q{n}" for n in range(rows)], "positive": [f"p{n}" for n in range(rows)]})
    return Task("stream", "text-pair", data.to_iterable_dataset(num_shards=shards), 3, shuffle_buffer_size=7)


@pytest.mark.parametrize("shards", [1, 3, 4])
@pytest.mark.parametrize("readers", [1, 2, 3])
def test_together_the_readers_see_every_row_once_an_epoch(shards, readers):
    seen: Counter = Counter()
    for number in range(readers):
        reader = BlockReader(task(37, shards), 0, number, readers)
        epoch = []
        while True:
            names, columns = reader.take(1)
            if reader.epoch:
                assert names[0].endswith(", epoch 1")
                break
            epoch += columns["query"]
        seen.update(epoch)
    assert seen == Counter({f"q{n}": 1 for n in range(37)})


def test_rows_are_named_by_their_number():
    assert sorted(BlockReader(task(9, 1), 0, 0, 1).take(9)[0]) == [str(n) for n in range(9)]
    names, columns = BlockReader(task(9, 1), 0, 1, 2).take(4)
    assert [f"q{name}" for name in names] == columns["query"], "also where two readers share the rows of one shard"
    assert BlockReader(task(6, 2), 0, 1, 2).take(1)[0][0] in [f"{n} of part 2/2" for n in range(3)]


def test_rows_come_in_an_order_of_the_seed():
    orders = [BlockReader(task(30, 1), seed, 0, 1).take(30)[1]["query"] for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert orders[0] != [f"q{n}" for n in range(30)]
    reader = BlockReader(task(30, 1), 0, 0, 1)
    assert reader.take(30)[1]["query"] != reader.take(30)[1]["query"], "another order in the next epoch"


@pytest.mark.parametrize("used", [0, 1, 6, 7, 8, 20, 29, 30, 31, 55])
def test_a_reader_continues_where_another_stopped(used):
    whole = BlockReader(task(30, 4), 5, 0, 1)
    whole.take(used) if used else None
    state = json.loads(json.dumps(whole.state()))
    again = BlockReader(task(30, 4), 5, 0, 1)
    again.load_state(state)
    for count in (3, 11, 40):
        assert again.take(count) == whole.take(count)


def test_a_stream_without_rows_and_one_without_a_column():
    empty = Dataset.from_dict({"query": ["a"], "positive": ["b"]}).to_iterable_dataset().filter(lambda row: False)
    with pytest.raises(ValueError, match="stream of task 's' has no rows for reader 0"):
        BlockReader(Task("s", "text-pair", empty, 1), 0, 0, 1).take(1)
    unknown = Dataset.from_dict({"query": ["a"]}).to_iterable_dataset().map(lambda row: {**row})
    with pytest.raises(ValueError, match="has no column 'positive'"):
        BlockReader(Task("s", "text-pair", unknown, 1), 0, 0, 1).take(1)


@pytest.mark.parametrize("files", [[10] * 12, [30, 30], [40, 80]])
def test_two_real_processes_with_two_workers_share_the_files(tmp_path, files):
    """Twelve files for four readers, and fewer files than readers: in an epoch every row comes once."""
    pattern = shards(tmp_path / "shards", files)
    rows = sum(files)
    script = Path(__file__).with_name("stream_in_processes.py")
    steps = rows // 5 // 2  # of a process, in batches of 5
    for rank in run_ranks(2, script, pattern, tmp_path, str(steps)):
        assert rank.returncode == 0, rank.stderr[-3000:]
    seen = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert len(seen[0]) == len(seen[1]) == rows // 2
    if files != [40, 80]:  # there two readers have 20 rows and two have 40: the former begin a second epoch
        assert Counter(seen[0] + seen[1]) == Counter(f"{n:05}.tar/{s:06}" for n, s in numbered(files))
    else:
        assert set(seen[0] + seen[1]) <= {f"{n:05}.tar/{s:06}" for n, s in numbered(files)}
        assert max(Counter(seen[0] + seen[1]).values()) <= 2


def numbered(files: list[int]) -> list[tuple[int, int]]:
    """(number of the file, number of the sample) of every row."""
    return [(n, s) for n, count in enumerate(files) for s in range(sum(files[:n]), sum(files[:n]) + count)]
