"""Parts of a LanceDB table: each row once whatever is killed, every writer's rows, nothing of others overwritten."""

import pickle
import time
from collections import Counter

import lancedb
import numpy as np
import pyarrow as pa
import pytest

from bifocal.hub.lance import indexes
from bifocal.hub.lance.parts import LanceParts
from bifocal.hub.lance.search import LanceIndex
from bifocal.hub.search.hits import SearchError
from tests.hub.lance.tables import Settings, captioned, rows, vectors
from tests.processes import Process


@pytest.fixture
def uri(tmp_path) -> str:
    return str(tmp_path / "database")


def started(uri: str, **changes) -> LanceParts:
    parts = LanceParts(uri)
    parts.start(Settings(tuple(changes.items())))
    return parts


def keys(uri: str) -> list[str]:
    return sorted(lancedb.connect(uri).open_table("items").to_arrow()["key"].to_pylist())


def hits(uri: str, vector: np.ndarray, *args, text: str = "", **options) -> list:
    return LanceIndex(uri, **options).rank(vector[None], *args).hits(0, text)


def test_a_part_written_again_has_each_row_once(uri):
    parts = started(uri)
    parts.write("part-1", rows("one", 5), {"rows_read": 6})
    parts.write("part-2", rows("two", 0), {"rows_read": 3})
    again = pickle.loads(pickle.dumps(parts))
    assert again.count() == 2
    again.write("part-1", rows("one", 4, seed=1), {"rows_read": 7})
    assert keys(uri) == [f"one-{row:04d}" for row in range(4)]
    assert again.written() == {"part-1": {"rows_read": 7}, "part-2": {"rows_read": 3}}


def test_a_part_that_another_process_has_started_meanwhile_has_each_row_once(uri):
    parts, other = started(uri), LanceParts(uri)
    for writer, number in ((parts, 1), (other, 2), (parts, 3), (other, 4)):
        writer.write(f"part-{number}", rows(f"n{number}", 3), {})
    parts.write("part-4", rows("again", 2), {})
    other._open()[1].optimize()
    other.write("part-5", rows("five", 2), {})
    parts.write("part-5", rows("again-five", 1), {})
    counted = Counter(key.rpartition("-")[0] for key in keys(uri))
    assert counted == {"n1": 3, "n2": 3, "n3": 3, "again": 2, "again-five": 1}
    parts.finish()


def test_the_log_is_read_again_where_it_was_rewritten_in_another_order(uri):
    parts = started(uri)
    parts.write("part-1", rows("one", 2), {})
    parts.write("part-2", rows("two", 2), {})
    parts._log_names[:] = ["part-1", "part-1", "part-3"]
    assert parts._is_logged(parts._open()[1], "part-1")
    assert not parts._is_logged(parts._open()[1], "part-3")


def test_a_part_of_a_killed_run_is_not_written(uri, monkeypatch):
    parts = started(uri)
    parts.write("part-1", rows("one", 5), {})
    log = LanceParts._log

    def killed(self, table, name, state, *rest):
        if state == "written":
            raise KeyboardInterrupt
        log(self, table, name, state, *rest)

    monkeypatch.setattr(LanceParts, "_log", killed)
    with pytest.raises(KeyboardInterrupt):
        parts.write("part-2", rows("two", 5), {})
    monkeypatch.undo()
    assert list(parts.written()) == ["part-1"]
    assert parts.finish().startswith("5 rows")
    parts.write("part-2", rows("two", 5), {})
    assert parts.finish().startswith("10 rows")
    assert keys(uri) == [f"{part}-{row:04d}" for part in ("one", "two") for row in range(5)]


def test_a_part_of_two_writers_at_once_is_written_again(uri):
    parts = started(uri)
    parts.write("part-1", rows("one", 5), {})
    table = lancedb.connect(uri).open_table("items")
    table.add(table.to_arrow())
    with pytest.raises(SearchError, match=r"Part 'part-1' at .* has 10 rows, not 5, as two runs at once leave it"):
        parts.finish()
    assert parts.written() == {}
    parts.write("part-1", rows("one", 5), {})
    assert parts.finish().startswith("5 rows")


_WRITER = """
import sys
from bifocal.hub.lance.parts import LanceParts
from tests.hub.lance.tables import Settings, rows
number = int(sys.argv[2])
parts = LanceParts(sys.argv[1])
parts.start(Settings())
for part in range(4):
    name = f"part-{number}-{part}"
    parts.write(name, rows(name, 20, seed=10 * number + part), {"number": number})
"""


def test_processes_write_at_once_and_one_is_killed(uri):
    parts = started(uri)
    writers = [Process("-c", _WRITER, uri, str(number)) for number in range(3)]
    while writers[0].running and "part-0-1" not in parts.written():
        time.sleep(0.01)
    writers[0].kill()
    writers[0].finish()
    for writer in writers[1:]:
        done = writer.finish()
        assert done.returncode == 0, done.stderr
    missing = [f"part-0-{part}" for part in range(4) if f"part-0-{part}" not in parts.written()]
    assert len(parts.written()) + len(missing) == 12
    for name in missing:
        parts.write(name, rows(name, 20), {"number": 0})
    assert parts.finish().startswith("240 rows")
    assert keys(uri) == sorted(
        f"part-{number}-{part}-{row:04d}" for number in range(3) for part in range(4) for row in range(20)
    )


def test_rows_of_others_are_never_overwritten(uri):
    lancedb.connect(uri).create_table("items", pa.table({"id": [1, 2]}))
    with pytest.raises(SearchError, match="written by another version or program"):
        started(uri)
    with pytest.raises(SearchError, match="written by another version or program"):
        LanceIndex(uri)
    assert lancedb.connect(uri).open_table("items").to_arrow() == pa.table({"id": [1, 2]})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": "ffff"}, r"are of other weights \(of 'models/a', 0123abcd, not ffff\)"),
        ({"source": {"path": "other"}}, r"other settings \(source: {'path': 'photos'}, not {'path': 'other'}\)"),
        ({"precision": "int8"}, "holds no vectors in int8. Choose --precision float32 or float16"),
    ],
)
def test_other_settings_are_refused(uri, changes, message):
    started(uri).write("part-1", rows("one", 2), {})
    with pytest.raises(SearchError, match=message):
        started(uri, **changes)
    started(uri, model="moved/a")
    assert len(keys(uri)) == 2


def test_an_image_and_its_caption_are_one_hit(uri):
    parts = started(uri)
    parts.write("part-1", captioned(), {})
    parts.write("part-2", rows("other", 3, seed=5), {})
    parts.finish()
    assert LanceIndex(uri).counts() == {"image": 3, "text": 4, "caption": 3}
    caption, text = vectors(7)[3], vectors(7)[6]  # of b.png, and of the notes
    best = hits(uri, caption, 2)[0]
    assert (best.name, best.kind, best.caption, best.thumbnail) == ("b.png", "image", "a grey wolf", b"png b.png")
    assert best.score == pytest.approx(1, abs=1e-6)
    for kinds, vector, name in ((["image"], caption, "b.png"), (["text"], text, "notes.txt")):
        found = hits(uri, vector, 10, kinds)
        assert found[0].name == name
        assert {hit.kind for hit in found} == set(kinds)
        assert len({hit.name for hit in found}) == len(found) == {"image": 3, "text": 4}[kinds[0]]


def test_rows_of_equal_content_are_one_hit(uri):
    parts = started(uri)
    same = rows("one", 3)
    parts.write("part-1", same, {})
    parts.write("part-2", same.set_column(2, "name", pa.array(["copy:0", "copy:1", "copy:2"])), {})
    found = hits(uri, vectors(3)[0], 3)
    assert len(found) == 3
    assert found[0].names == ("one.jsonl:0", "copy:0")


def test_words_find_what_vectors_do_not(uri):
    parts = started(uri)
    parts.write("part-1", rows("one", 200), {})
    with pytest.raises(SearchError, match="has no full-text indexes yet"):
        LanceIndex(uri, hybrid=True)
    parts.finish()
    query = vectors(200)[3]
    assert "zebra150" not in " ".join(hit.text for hit in hits(uri, query, 5))
    found = hits(uri, query, 5, text="zebra150", hybrid=True)
    assert {hit.text for hit in found[:2]} == {"zebra3 of one", "zebra150 of one"}
    assert [hit.score for hit in found] == pytest.approx(
        [vectors(200)[int(hit.name.split(":")[1])] @ query for hit in found], abs=1e-5
    )
    by_name = hits(uri, query, 5, text="77", hybrid=True)
    assert "zebra77 of one" in [hit.text for hit in by_name]
    assert [hit.name for hit in hits(uri, query, 5, hybrid=True)] == [hit.name for hit in hits(uri, query, 5)]


def test_a_filter_is_one_of_sql(uri):
    parts = started(uri)
    parts.write("part-1", rows("one", 20), {})
    parts.write("part-2", captioned(seed=3), {})
    parts.finish()
    found = hits(uri, vectors(20)[3], 30, where="text LIKE 'zebra1%' OR name = 'b.png'")
    assert sorted(hit.name for hit in found) == sorted(["b.png", *(f"one.jsonl:{row}" for row in (1, *range(10, 20)))])
    assert LanceIndex(uri, where="kind = 'image'").counts() == {"image": 3, "text": 0, "caption": 0}
    with pytest.raises(SearchError, match=r"The filter 'size = 3' cannot be used \(.*No field named size.*over key, "):
        LanceIndex(uri, where="size = 3")
    with pytest.raises(SearchError, match=r"The filter 'kind = = 3' cannot be used \(.*sql parser error"):
        LanceIndex(uri, where="kind = = 3")


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_an_approximate_search_gives_exact_scores(uri, monkeypatch, precision):
    monkeypatch.setattr(indexes, "MIN_ROWS_FOR_ANN", 500)
    parts = started(uri, precision=precision)
    parts.write("part-1", rows("one", 600, dtype=precision), {})
    assert "600 rows, vectors with an IVF-PQ index" in parts.finish()
    table = lancedb.connect(uri).open_table("items")
    assert table.index_stats("vector_idx").index_type == "IVF_PQ"
    query = vectors(600)[7]
    exact = np.argsort(-vectors(600) @ query)[:20].tolist()
    found = hits(uri, query, 20)
    numbers = [int(hit.name.split(":")[1]) for hit in found]
    assert len(set(numbers) & set(exact)) >= 15
    expected = [vectors(600)[number] @ query for number in numbers]
    assert [hit.score for hit in found] == pytest.approx(expected, abs=1e-5 if precision == "float32" else 1e-3)
    # Rows that came later are found at once, and are in the index after the next run.
    parts.write("part-2", rows("two", 50, seed=9), {})
    assert hits(uri, vectors(50, seed=9)[3], 1)[0].name == "two.jsonl:3"
    parts.finish()
    stats = lancedb.connect(uri).open_table("items").index_stats("vector_idx")
    assert (stats.num_indexed_rows, stats.num_unindexed_rows) == (650, 0)


def test_a_sample_holds_a_rare_kind(uri, monkeypatch):
    monkeypatch.setattr(indexes, "_ROWS_TO_SAMPLE_FROM", 100)
    parts = started(uri)
    parts.write("part-1", rows("one", 3000), {})
    parts.write("part-2", captioned().slice(0, 1), {})
    many = pa.concat_tables([captioned(seed).slice(0, 1) for seed in range(12)])
    parts.write("part-2", many.set_column(0, "key", pa.array([f"image-{row}" for row in range(12)])), {})
    parts.finish()
    sample = lancedb.connect(uri).open_table("items_calibration").to_arrow()
    kinds = sample["kind"].to_pylist()
    assert (kinds.count("image"), kinds.count("text")) == (12, 1024)


def test_there_is_no_database(tmp_path):
    with pytest.raises(SearchError, match=r"There is no database at '.*nowhere'"):
        LanceIndex(str(tmp_path / "nowhere"))
    assert not (tmp_path / "nowhere").exists()
    (tmp_path / "empty").mkdir()
    with pytest.raises(SearchError, match="There is no table 'items' at"):
        LanceIndex(str(tmp_path / "empty"))
