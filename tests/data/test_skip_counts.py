"""Skipped rows are counted by cause and named in the log, and too many of them stop a run."""

import json

import pytest

from bifocal.data.loading import load_source
from bifocal.data.skips import BadRowsError, SkipLog, SkippedRow
from bifocal.data.source import Source
from tests.data.files import lines


def test_counts_and_the_log(tmp_path):
    rows = [{"query": "" if n % 200 == 7 else f"q {n}", "positive": "p"} for n in range(1000)]
    path = lines(tmp_path / "a.jsonl", rows)
    skipped = SkipLog(tmp_path / "log" / "skipped.jsonl")
    for _ in range(2):  # the second time from the cache
        data = load_source(Source(path=str(path)), "text-pair", 0, skipped, "pairs")
        assert len(data) == 995
    assert skipped.bad == {"pairs": {"no query": 10}}
    assert skipped.rows == {"pairs": 2000}
    named = [json.loads(line) for line in (tmp_path / "log" / "skipped.jsonl").read_text().splitlines()]
    assert named[0] == {
        "task": "pairs", "row": "a.jsonl:8", "cause": "no query", "detail": "an empty text", "filtered": False,
    }  # fmt: skip
    with pytest.raises(
        BadRowsError, match=r"'a': 0.5% of 1,000 rows are bad, more than max_bad_fraction=0.001 allows \(5 no query"
    ):
        load_source(Source(path=str(path), max_bad_fraction=0.001), "text-pair", name="a")


def test_the_limit_waits_for_rows_that_say_something():
    skipped = SkipLog()
    skipped.add("t", 10, [SkippedRow("r", "broken image")])
    skipped.check("t", 0.01)
    with pytest.raises(BadRowsError, match=r"10\.0% of 10 rows"):
        skipped.check("t", 0.01, ended=True)
    skipped.add("t", 990)
    skipped.check("t", 0.01)
    skipped.add("t", 1000, [SkippedRow("r", "no caption")] * 20)
    with pytest.raises(BadRowsError, match=r"1.1% of 2,000 rows are bad.*\(20 no caption, 1 broken image\)"):
        skipped.check("t", 0.01)


def test_what_a_filter_drops_is_not_bad():
    skipped = SkipLog()
    skipped.add("t", 1000, [SkippedRow("r", "short caption", filtered=True)] * 900)
    skipped.check("t", 0.01, ended=True)
    assert skipped.filtered == {"t": {"short caption": 900}}


def test_a_lost_shard_weighs_as_much_as_the_others(tmp_path):
    skipped = SkipLog()
    skipped.add("t", 200_001, [SkippedRow("x.tar", "missing file", file_lost=True)], shards=200)
    assert skipped.share("t") == pytest.approx(1 / 201, rel=0.01)
    skipped.check("t", 0.01)
    skipped.add("t", 2, [SkippedRow("y.tar", "missing file", file_lost=True)] * 2)
    with pytest.raises(BadRowsError):
        skipped.check("t", 0.01)


def test_counts_go_on_from_a_state_and_the_log_with_them(tmp_path):
    skipped = SkipLog(tmp_path / "s.jsonl")
    skipped.add("t", 5, [SkippedRow("a", "x")])
    state = json.loads(json.dumps(skipped.state()))
    skipped.add("t", 5, [SkippedRow("b", "x")])
    again = SkipLog(tmp_path / "s.jsonl")
    again.load_state(state)
    again.add("t", 5, [SkippedRow("c", "x")])
    assert again.bad == {"t": {"x": 2}}
    assert [json.loads(line)["row"] for line in (tmp_path / "s.jsonl").read_text().splitlines()] == ["a", "c"]
