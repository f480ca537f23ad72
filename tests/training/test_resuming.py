"""A run that is killed and started again ends to the bit as one that was not."""

import os
import random
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from tests.data.files import add, picture

SCRIPT = Path(__file__).with_name("run_until_killed.py")
ROOT = Path(__file__).parents[2]


def run(out: Path, step: int, way: str, workers: int) -> subprocess.CompletedProcess:
    out.mkdir(exist_ok=True)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), str(out), str(step), way, str(workers)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)


def assert_equal(left, right, name: str = "") -> None:
    if isinstance(left, dict):
        assert left.keys() == right.keys(), name
        for key in left:
            assert_equal(left[key], right[key], f"{name}/{key}")
    elif isinstance(left, list):
        assert len(left) == len(right), name
        for number, (a, b) in enumerate(zip(left, right, strict=True)):
            assert_equal(a, b, f"{name}/{number}")
    elif isinstance(left, torch.Tensor):
        assert torch.equal(left, right), name
    else:
        assert left == right, name


def spoilt_shards(folder: Path) -> None:
    """Three tar shards, of whose 70 samples six are no pictures and three have no caption."""
    folder.mkdir()
    for number, (first, count) in enumerate([(0, 30), (30, 25), (55, 15)]):
        with tarfile.open(folder / f"{number}.tar", "w") as tar:
            for sample in range(first, first + count):
                add(tar, f"{sample}.jpg", b"no picture" if sample % 13 == 5 else picture(seed=sample))
                add(tar, f"{sample}.txt", b"" if sample % 20 == 9 else f"star {sample}".encode())


@pytest.mark.parametrize(
    ("way", "workers"), [("map", 0), ("map", 2), ("stream", 0), ("stream", 2), ("shards", 0), ("shards", 2)]
)
def test_killed_and_resumed_it_ends_the_same(way, workers, processor, tmp_path):
    processor.save_pretrained(tmp_path / "processor")
    if way == "shards":
        spoilt_shards(tmp_path / "shards")
    done = run(tmp_path / "whole", -1, way, workers)
    assert done.returncode == 0, done.stderr[-3000:]
    first = random.Random(f"{way}{workers}").randint(4, 12)
    for step in (first, first + 9):
        killed = run(tmp_path / "cut", step, way, workers)
        assert killed.returncode == -signal.SIGKILL, killed.stderr[-3000:]
    done = run(tmp_path / "cut", -1, way, workers)
    assert done.returncode == 0, done.stderr[-3000:]
    whole, cut = (torch.load(tmp_path / name / "result.pt") for name in ("whole", "cut"))
    assert len(whole["logs"]) >= 5
    assert_equal(whole, cut)
    if way == "shards":
        assert len(whole["skipped"]["log"]) == sum(whole["skipped"]["bad"]["laion"].values()) > 5
