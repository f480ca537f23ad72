"""Data sets of the Hub and files on it, through the real huggingface_hub and datasets, from a server in its place."""

import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from bifocal.data.corpora import NUMBERED, corpus
from bifocal.data.loading import load_source
from bifocal.data.source import Source
from bifocal.training.streams import BlockReader
from bifocal.training.tasks import Task
from tests.data.files import image_bytes, shards
from tests.hub_stand_in import Repo, hub
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
from bifocal.data.corpora import NUMBERED, corpus
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
from bifocal.data.corpora import NUMBERED, corpus
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


def _held_as(kind: str, number: int) -> dict:
    """What data sets of a kind hold as each of our columns."""
    positive = [f"p {number}"] if kind == "text-triplet" else f"p {number}"
    image = {"bytes": image_bytes(), "path": None}
    return {"image": image, "caption": [f"c {number}"], "query": f"q {number}", "positive": positive,
            "negatives": [f"n {k}" for k in range(9)], "text": f"t {number}"}  # fmt: skip


def _repository(name: str) -> Repo:
    """A data set as the registry says that it is on the Hub: configuration, split and columns."""
    entry = corpus(name)
    rows = []
    for number in range(40):
        row: dict = {}
        for ours, theirs in entry.columns.items():
            value = _held_as(entry.kind, number)[ours]
            if theirs == NUMBERED:
                row |= {f"negative_{k + 1}": text for k, text in enumerate(value)}
                continue
            outer, dot, inner = theirs.partition(".")
            row[outer] = {inner: value[0]} if dot else value
        if entry.format == "sharegpt4v":
            turns = [{"from": "human", "value": "<image>\nDescribe."}, {"from": "gpt", "value": f"c {number}"}]
            row = {"id": str(number), "image": _held_as(entry.kind, number)["image"], "conversations": turns}
        rows.append(row)
    content = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), content)
    config = entry.name or "default"
    card = (
        f"---\nconfigs:\n- config_name: {config}\n  data_files:\n"
        f"  - split: {entry.split}\n    path: {config}/{entry.split}-*\n---\n"
    )
    return Repo({"README.md": card.encode(), f"{config}/{entry.split}-00000-of-00001.parquet": content.getvalue()})


def test_corpora_of_every_kind_as_the_registry_describes_them():
    """Whole and streamed, corpora are read by the registry's ids, configurations, splits and columns."""
    names = [
        "s2orc-title-abstract", "nomic-pairs-paq", "hotpotqa-triplets", "e5r-nq", "msmarco-distilbert-mnrl-50",
        "flickr30k-karpathy", "coco-karpathy-images", "llava-recap-558k", "c4",
    ]  # fmt: skip
    script = f"""
import json
from bifocal.data.corpora import corpus
from bifocal.data.source import Source
from bifocal.data.corpora import NUMBERED, corpus
from bifocal.data.loading import load_source
for name in {names}:
    for streaming in (False, True):
        row = next(iter(load_source(Source(path=f"corpus:{{name}}", streaming=streaming), corpus(name).kind)))
        row = {{key: value for key, value in row.items() if not key.startswith("_")}}
        print(json.dumps([name, {{key: "image" if key == "image" else value for key, value in row.items()}}]))
from bifocal.data.skips import SkipLog
from bifocal.training.joint_batches import Schedule
from bifocal.training.recipe import Recipe
from bifocal.training.runner import recipe_tasks
mixture = {{"weights": {{"s2orc-title-abstract": 0.01, "e5r-nq": 2}}, "streaming": True}}
pairs = {{"name": "pairs", "kind": "text-pair", "batch_size": 4, "mixture": mixture}}
recipe = Recipe(name="mixed", tasks=[pairs], training={{"max_steps": 1}})
print(json.dumps(Schedule(recipe_tasks(recipe, recipe.tasks, load_source, SkipLog()), 10, 0).shares))
"""
    with hub() as (_, state):
        for name in names:
            state.repos[f"datasets/{corpus(name).dataset_id}"] = _repository(name)
        *rows, shares = python(script)
    assert [name for name, _ in rows] == [name for name in names for _ in range(2)]
    for name, row in rows:
        kind = corpus(name).kind
        expected = {
            "text-pair": {"query": "q 0", "positive": "p 0"},
            "text-triplet": {"query": "q 0", "positive": ["p 0"], "negatives": [f"n {k}" for k in range(9)]},
            "image-text": {"image": "image", "caption": ["c 0"]},
            "text-only": {"text": "t 0"},
        }[kind]
        if name == "msmarco-distilbert-mnrl-50":
            expected["negatives"] = expected["negatives"][:7]
        if name in ("coco-karpathy-images", "llava-recap-558k"):
            assert row["caption"] in ("c 0", ["c 0"]), "a table's captions are lists"
            del expected["caption"]
        assert expected.items() <= row.items(), name
    drawn = [corpus("s2orc-title-abstract").num_rows * 0.01, corpus("e5r-nq").num_rows * 2]
    assert shares == pytest.approx({"s2orc-title-abstract": drawn[0] / sum(drawn), "e5r-nq": drawn[1] / sum(drawn)})


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
