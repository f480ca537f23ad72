"""Readers of streams: every row once, split without overlap, and found again where they stood."""

import json
from collections import Counter

import pytest
from datasets import Dataset

from bifocal.training import streams
from bifocal.training.streams import BlockReader
from bifocal.training.tasks import Task


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(streams, "BLOCK", 7)


def task(rows: int, shards: int) -> Task:
    data = Dataset.from_dict({"query": [f"q{n}" for n in range(rows)], "positive": [f"p{n}" for n in range(rows)]})
    return Task("stream", "text-pair", data.to_iterable_dataset(num_shards=shards), 3)


@pytest.mark.parametrize("shards", [1, 3, 4])
@pytest.mark.parametrize("readers", [1, 2, 3])
def test_together_the_readers_see_every_row_once_an_epoch(shards, readers):
    seen: Counter = Counter()
    for number in range(readers):
        reader = BlockReader(task(37, shards), 0, number, readers)
        epoch = []
        while True:
            names, columns = reader.take(1)
            if names[0].startswith("1/"):
                break
            epoch += columns["query"]
        seen.update(epoch)
    assert seen == Counter({f"q{n}": 1 for n in range(37)})


def test_rows_come_in_an_order_of_the_seed():
    orders = [BlockReader(task(30, 1), seed, 0, 1).take(30)[1]["query"] for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert orders[0] != [f"q{n}" for n in range(30)]
    reader = BlockReader(task(30, 1), 0, 0, 1)
    assert reader.take(30)[1]["query"] != reader.take(30)[1]["query"], "another order in the next epoch"


@pytest.mark.parametrize("used", [0, 1, 6, 7, 8, 20, 29, 30, 31, 55])
def test_a_reader_goes_on_where_another_stood(used):
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
    with pytest.raises(ValueError, match="lacks the column 'positive'"):
        BlockReader(Task("s", "text-pair", unknown, 1), 0, 0, 1).take(1)
