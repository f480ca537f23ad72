"""Data sets of the Hub and files on it, through the real huggingface_hub and datasets, from a server in its place."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from bifocal.data.loading import load_source
from bifocal.data.source import Source
from bifocal.training.streams import BlockReader
from bifocal.training.tasks import Task
from tests.data.files import shards
from tests.hub_stand_in import hub
from tests.processes import run


def python(script: str) -> list:
    """What a script prints, a JSON value a line, run where the Hub is elsewhere."""
    done = run("-c", script, hub=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_shards_by_pattern(tmp_path):
    shards(tmp_path / "repo", [3, 2])
    script = """
import json
from bifocal.data.source import Source
from bifocal.data.loading import open_stream
for path in ("hf://datasets/org/laion/*.tar", "hf://datasets/org/laion/{00000..00002}.tar"):
    rows = open_stream(Source(path=path, streaming=True), "image-text").rows()
    print(json.dumps([row.cause if isinstance(row, Exception) else row["caption"] for _, row in rows]))
"""
    with hub(tmp_path / "repo", "org/laion") as (_, state):
        by_glob, by_braces = python(script)
    assert by_glob == [f"caption {n}" for n in range(5)]
    assert by_braces == [*by_glob, "missing file"]
    assert any("resolve/main/00001.tar" in line for line in state.asked)


def test_a_corpus_of_the_registry(tmp_path):
    """`corpus:all-nli` asks the Hub for the right repository, configuration and columns, streamed or not."""
    (tmp_path / "repo" / "pair").mkdir(parents=True)
    rows = [{"anchor": f"q {n}", "positive": "" if n == 3 else f"p {n}"} for n in range(200)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "repo" / "pair" / "train-00000-of-00001.parquet")
    (tmp_path / "repo" / "README.md").write_text(
        "---\nconfigs:\n- config_name: pair\n  data_files:\n  - split: train\n    path: pair/train-*\n---\n"
    )
    script = """
import json
from bifocal.data.skips import SkipLog
from bifocal.data.source import Source
from bifocal.data.loading import load_source
skipped = SkipLog()
data = load_source(Source(path="corpus:all-nli"), "text-pair", 0, skipped, "nli")
print(json.dumps([len(data), data[0], skipped.bad]))
stream = load_source(Source(path="corpus:all-nli", streaming=True), "text-pair")
print(json.dumps([row["query"] for row in stream][:5]))
"""
    with hub(tmp_path / "repo", "sentence-transformers/all-nli"):
        whole, streamed = python(script)
    assert whole == [199, {"query": "q 0", "positive": "p 0"}, {"nli": {"no positive": 1}}]
    assert streamed == ["q 0", "q 1", "q 2", None, "q 4"]


@pytest.mark.parametrize("used", [0, 3, 90, 150])
def test_a_stream_of_datasets_skips_bad_rows_and_resumes(tmp_path, monkeypatch, used):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "repo").mkdir()
    for part in range(2):
        rows = [{"query": "" if n % 20 == 5 else f"q {part} {n}", "positive": "p"} for n in range(60)]
        Dataset.from_list(rows).to_parquet(tmp_path / "repo" / f"train-{part}.parquet")
    source = Source(path=str(tmp_path / "repo"), streaming=True, format="hub")
    task = Task("t", "text-pair", load_source(source, "text-pair"), 4, shuffle_buffer_size=32)
    whole = BlockReader(task, 1, 0, 1)
    seen = whole.take(used)[1].get("query", []) if used else []
    again = BlockReader(Task("t", "text-pair", load_source(source, "text-pair"), 4, shuffle_buffer_size=32), 1, 0, 1)
    again.load_state(json.loads(json.dumps(whole.state())))
    whole.report()
    for _ in range(3):
        assert again.take(17) == whole.take(17)
        assert again.report() == whole.report()
    if used == 90:
        rest = BlockReader(task, 1, 0, 1).take(114)[1]["query"]
        assert rest[:90] == seen
        assert len(set(rest)) == 114, "an epoch: every good row once"
