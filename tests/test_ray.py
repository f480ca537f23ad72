"""Tasks, `data clean` and `embed` on a Ray cluster of two nodes whose processes are killed with SIGKILL."""

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest

from tests.bifocal.commands import invoke
from tests.data.files import lines
from tests.data.tasks import MakeSquarer
from tests.processes import Process, run, skip_if_quick
from tests.ray_cluster import ENVIRONMENT, RayCluster, name_of, ray_folder, running_cluster

pytest.importorskip("ray", reason="needs ray, which `dev` brings")
ROOT = Path(__file__).parents[1]

TASKS = """
import json, sys
from dataclasses import asdict
from pathlib import Path
from bifocal.data.parallel import Execution, TaskFailed, run_tasks
from tests.data.tasks import MakeSquarer, Square
troubles = {2: "raise", 3: "bug", 4: "kill once", 5: "kill"}
tasks = [Square(number, troubles.get(number, ""), 0.2) for number in range(10)]
execution = Execution(ray=sys.argv[1])
results = run_tasks(tasks, MakeSquarer(Path(sys.argv[2])), execution, lambda task: task.name)
print(json.dumps([[type(result).__name__, asdict(result)] for result in results]))
try:
    list(run_tasks(tasks, MakeSquarer(Path(sys.argv[2]), "raise"), execution, str))
except Exception as error:
    print(json.dumps([type(error).__name__, str(error)]))
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    skip_if_quick()
    with running_cluster() as cluster:
        yield cluster


def test_every_task_gives_one_result_whoever_dies(cluster, tmp_path):
    done = run("-c", TASKS, cluster.address, tmp_path, cwd=ROOT, **cluster.environment)
    assert done.returncode == 0, done.stderr
    results, error = map(json.loads, done.stdout.splitlines())
    squares = [result for name, result in results if name == "Squared"]
    assert sorted((square["number"], square["square"]) for square in squares) == [
        (number, number**2) for number in range(10) if number not in (2, 3, 5)
    ]
    failed = {result["name"]: result["message"] for name, result in results if name == "TaskFailed"}
    assert failed == {
        "square 2": "2 is unlucky.",
        "square 3": "KeyError: 3",
        "square 5": "its process was killed 4 times, perhaps because memory ran out",
    }
    assert len(set(MakeSquarer(tmp_path).lines("parents.txt"))) == 2  # nodes
    begun = MakeSquarer(tmp_path).lines("begun.txt")
    assert {number: begun.count(str(number)) for number in range(10)} == dict.fromkeys(range(10), 1) | {4: 2, 5: 4}
    assert error == ["ModelError", "There is no model."]


@pytest.fixture
def texts(desk) -> Path:
    """A folder with a model and ten files of texts."""
    for file in range(10):
        lines(desk / f"texts-{file:02}.jsonl", [{"text": f"sentence {file} {number}"} for number in range(40)])
    return desk


def table(folder: Path) -> dict[str, dict]:
    rows = pq.read_table(folder).to_pylist()
    assert len({row["key"] for row in rows}) == len(rows)
    return {row["key"]: row for row in rows}


def test_embed_on_two_nodes_gives_the_rows_of_one_process(cluster, texts):
    command = ["embed", "texts-*.jsonl", "--model", "model", "--rows-per-part", "10"]
    one = invoke(texts, *command[:2], "one", *command[2:])
    assert "400 embedded, 0 embedded before, 0 skipped" in one.stdout, one.stderr
    # One file fails for good: it has changed since one of its parts was written.
    changed = texts / "texts-07.jsonl"
    content = changed.read_text()
    shutil.copytree(texts / "one", texts / "two")
    for part in (texts / "two").glob("part-*.parquet"):
        if part.name != "part-00007-000003.parquet":
            part.unlink()
    changed.write_text(content.replace('sentence 7 31"', 'another sentence"'))
    on_cluster = ["--ray", cluster.address, "--num-cpus", "0.5", "--concurrency", "2"]
    process = Process("-m", "bifocal", *command[:2], "two", *command[2:], *on_cluster, cwd=texts, **cluster.environment)
    wait_for(lambda: len(list((texts / "two").glob("part-*.parquet"))) > 3)
    victim = cluster.actors()[0]
    victim.kill()
    done = process.finish()
    assert done.returncode == 1, done.stderr
    assert "Failed: texts-07.jsonl: 'texts-07.jsonl' has changed since its part 'part-00007-000003'" in done.stderr
    assert "1 of the files or parts failed" in done.stderr
    assert not victim.is_running()
    changed.write_text(content)
    again = invoke(texts, *command[:2], "two", *command[2:])
    assert "0 embedded, 400 embedded before, 0 skipped" in again.stdout, again.stderr
    expected, actual = table(texts / "one"), table(texts / "two")
    assert list(actual) == list(expected)
    for key, row in expected.items():
        assert {**actual[key], "vector": None} == {**row, "vector": None}
        np.testing.assert_allclose(actual[key]["vector"], row["vector"], atol=1e-5)


CLEAN = """
from bifocal.cli import main
from bifocal.data import clean_copy
clean_copy._PART_BYTES = 0  # each file is a part
main()
"""


def test_data_clean_on_a_local_cluster_writes_what_one_process_writes(tmp_path, monkeypatch):
    skip_if_quick()
    for file in range(4):
        rows = [{"query": f"query {file} {n}", "positive": "" if n == 7 else f"text {n}"} for n in range(40)]
        rows[8] = {"query": "asked in each file", "positive": "answered in each file"}
        lines(tmp_path / f"{file}.jsonl", rows)
    (tmp_path / "evaluation").mkdir()
    lines(tmp_path / "evaluation" / "rows.jsonl", [{"text": "query 2 5"}])
    filters = ("clean.near_duplicate_texts=0.9", "clean.exclude_rows_of=evaluation/rows.jsonl", "max_bad_fraction=0.1")
    monkeypatch.setattr("bifocal.data.clean_copy._PART_BYTES", 0)
    one = invoke(tmp_path, "data", "clean", "*.jsonl", "one", *filters)
    assert one.stdout == (
        "152 rows are in one; skipped: 4 no positive, 3 near-duplicate text, 1 text of an excluded source "
        "(see one/skipped.jsonl).\n"
    )
    with ray_folder() as folder:
        command = ("data", "clean", "*.jsonl", "two", *filters, "--ray", "local")
        done = run("-c", CLEAN, *command, cwd=tmp_path, **ENVIRONMENT, RAY_TMPDIR=folder)
        assert done.returncode == 0, done.stderr
        assert not [process for process in psutil.process_iter() if folder in name_of(process)]
    assert done.stdout == one.stdout.replace("one", "two")
    contents = [{path.name: path.read_bytes() for path in (tmp_path / out).iterdir()} for out in ("one", "two")]
    assert contents[0] == contents[1]
    assert len(contents[0]) == 5


def wait_for(condition, seconds: float = 100.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)
