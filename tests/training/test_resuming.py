"""A run that is killed and started again ends to the bit as one that was not."""

import random
import signal
import tarfile
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch

from tests import processes
from tests.data.files import add, image_bytes
from tests.training import run_until_killed


def run(out: Path, step: int, way: str, workers: int) -> CompletedProcess:
    threads = str(torch.get_num_threads())
    return processes.run(run_until_killed.__file__, out, str(step), way, str(workers), OMP_NUM_THREADS=threads)


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
    """Three tar shards with 70 samples: six are not images and three have no caption."""
    folder.mkdir()
    for number, (first, count) in enumerate([(0, 30), (30, 25), (55, 15)]):
        with tarfile.open(folder / f"{number}.tar", "w") as tar:
            for sample in range(first, first + count):
                add(tar, f"{sample}.jpg", b"no image" if sample % 13 == 5 else image_bytes(seed=sample))
                add(tar, f"{sample}.txt", b"" if sample % 20 == 9 else f"star {sample}".encode())


@pytest.mark.parametrize(
    ("way", "workers"), [("map", 0), ("map", 2), ("stream", 0), ("stream", 2), ("shards", 0), ("shards", 2)]
)
def test_killed_and_resumed_it_ends_the_same(way, workers, processor, tmp_path):
    processor.save_pretrained(tmp_path / "processor")
    if way == "shards":
        spoilt_shards(tmp_path / "shards")
    run_until_killed.main(tmp_path / "whole", -1, way, workers)  # here, where the seed of hashes is another
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
