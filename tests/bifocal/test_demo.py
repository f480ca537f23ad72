"""The main job, quick: from nothing to a report, killed and resumed, and what is said of a wrong folder."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from bifocal.demo.runner import STAGES, _open_run, quick_settings
from bifocal.files import MARKER, NotOursError
from bifocal.modeling import BifocalModel
from tests.processes import Process


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


def variables(cache: Path) -> dict[str, str]:
    return {"BIFOCAL_CACHE": str(cache), "COLUMNS": "120", "OMP_NUM_THREADS": "1"}


def command(cache: Path, *arguments: str) -> Process:
    return Process("-m", "bifocal", "demo", "--quick", *arguments, cwd=cache, **variables(cache))


def finish(process: Process) -> tuple[int, str, str]:
    done = process.finish()
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def run(cache) -> Path:
    """A whole run; only this one starts Python as a user does."""
    out = cache / "whole"
    done = subprocess.run(
        [sys.executable, "-m", "bifocal", "demo", "--quick", "--out", str(out)], env={**os.environ, **variables(cache)},
        capture_output=True, text=True, cwd=cache, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (cache / "output.txt").write_text(done.stdout)
    return out


def test_it_does_all_it_says(run, cache):
    output = (cache / "output.txt").read_text()
    for number in (1, 2, 3):
        assert f"After stage {number}:" in output
    assert "AutoModel and SentenceTransformer load" in output
    assert output.count("right answer at rank") == 12
    results = json.loads((run / "results.json").read_text())
    assert results["load difference"] <= 1e-6
    assert [len(stage["losses"]) for stage in results["stages"]] == [2, 2, 2]
    page = (run / "report.html").read_text()
    assert "3: triplets + long captions" in page
    assert page.count('class="search"') == 32
    model = BifocalModel.from_pretrained(run / "model")
    assert model.encode_text(["black star"]).shape == (1, 64)


def test_a_finished_run_is_not_trained_again(run, cache):
    before = (run / "results.json").stat().st_mtime_ns
    code, output, _ = finish(command(cache, "--out", str(run)))
    assert code == 0
    assert "This run is finished" in output
    assert "--overwrite" in output
    assert (run / "results.json").stat().st_mtime_ns == before


@pytest.mark.parametrize("moment", ["stage1/checkpoint-8", "stage1/result.json", "stage2/result.json", "stage3/model"])
def test_killed_and_started_again_it_ends_the_same(run, cache, moment):
    """SIGKILL as soon as a file appears; then the run resumes and ends with the same weights."""
    out = cache / moment.replace("/", "-")
    process = command(cache, "--out", str(out))
    deadline = time.monotonic() + 200
    while not (out / moment).exists() and process.running and time.monotonic() < deadline:
        time.sleep(0.005)
    process.kill()
    assert process.finish().returncode == -signal.SIGKILL, "the run ended before it was killed"
    code, output, errors = finish(command(cache, "--out", str(out)))
    assert code == 0, errors
    assert "resumes from checkpoint" in output or "is finished already" in output
    whole, resumed = (BifocalModel.from_pretrained(folder / "model") for folder in (run, out))
    for (name, expected), value in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        np.testing.assert_array_equal(value, expected, err_msg=name)


def test_another_seed_is_another_run(run, cache):
    code, _, errors = finish(command(cache, "--out", str(run), "--seed", "1"))
    assert code == 1
    assert "holds a run with other settings" in errors
    assert "Traceback" not in errors


def test_overwrite_trains_again_and_touches_nothing_else(run, cache):
    (run / "notes.txt").write_text("mine")
    code, output, errors = finish(command(cache, "--out", str(run), "--overwrite"))
    assert code == 0, errors
    assert "After stage 3:" in output
    assert (run / "notes.txt").read_text() == "mine"


def test_a_folder_with_something_else_in_it(cache, tmp_path):
    (tmp_path / "thesis.tex").write_text("important")
    code, _, errors = finish(command(cache, "--out", str(tmp_path)))
    assert code == 1
    assert f"Error: '{tmp_path}' holds other files, but no run of the demo. Choose another folder" in errors
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    code, _, errors = finish(command(cache, "--out", str(tmp_path / "thesis.tex")))
    assert code == 1
    assert "is a file. Choose another folder with --out" in errors


def test_only_what_the_demo_wrote_is_cleared(run, tmp_path):
    """In this process: a project that has a settings.json and a model, and runs with something of the user's."""
    project = tmp_path / "project"
    (project / "model").mkdir(parents=True)
    (project / "model" / "weights").write_text("mine")
    for content in ('{"port": 80}', "words"):
        (project / "settings.json").write_text(content)
        with pytest.raises(NotOursError, match=r"settings.json' exists and is not known as a file of Bifocal's"):
            _open_run(project, quick_settings(0), overwrite_run=True)
        assert sorted(path.name for path in project.rglob("*")) == ["model", "settings.json", "weights"]
    for name, content in (
        ("report.html", "my notes"),
        ("model/notes", "mine"),
        ("stage2/model/notes", "mine"),
        ("stage2/result.json", "{}"),
        ("stage3/skipped.jsonl", "mine"),
        ("stage1/checkpoint-8/notes", "mine"),
    ):
        copy = tmp_path / name.replace("/", "-")
        shutil.copytree(run, copy)
        (copy / name).parent.mkdir(exist_ok=True)
        (copy / name).write_text(content)
        before = sorted(copy.rglob("*"))
        with pytest.raises(NotOursError, match=Path(name).name):
            _open_run(copy, quick_settings(0), overwrite_run=True)
        assert sorted(copy.rglob("*")) == before
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    (copy / "stage1" / "notes").write_text("mine")
    assert _open_run(copy, quick_settings(0), overwrite_run=True)
    left = {path.relative_to(copy).as_posix() for path in copy.rglob("*") if path.is_file()}
    assert left - {"notes.txt"} == {
        MARKER, "settings.json", "stage1/notes",
        *(f"{stage}/{name}" for stage in STAGES for name in (MARKER, "recipe.yaml", "versions.json")),
    }  # fmt: skip


def test_a_result_that_was_deleted_is_measured_again(cache, run):
    before = json.loads((run / "stage1" / "result.json").read_text())
    (run / "results.json").unlink()
    (run / "stage1" / "result.json").unlink()
    code, output, errors = finish(command(cache, "--out", str(run)))
    assert code == 0, errors
    assert "is finished already" in output
    after = json.loads((run / "stage1" / "result.json").read_text())
    assert after["losses"] == before["losses"]
    assert after["metrics"] == pytest.approx(before["metrics"], abs=1e-6)


def test_a_full_disk(cache, run, small_disk):
    code, _, errors = finish(command(cache, "--out", str(small_disk / "run")))
    assert code == 1
    last = errors.strip().splitlines()[-1]
    assert last.startswith(f"Error: Cannot write to {small_disk / 'run'} (")
    assert "or choose another --out" in last
    assert "Traceback" not in errors


def test_a_read_only_disk(cache, run, small_disk):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    code, _, errors = finish(command(cache, "--out", str(small_disk / "run")))
    assert code == 1
    assert errors.strip().splitlines()[-1].startswith(f"Error: Cannot write to {small_disk / 'run'} ([Errno 30]")
    assert "Traceback" not in errors
