"""Two real processes give what one gives with a batch of twice the size."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).with_name("run_in_processes.py")
ROOT = Path(__file__).parents[2]


def run(out: Path, processes: int, batch: int, options: dict, kind: str, steps: int = 20) -> dict:
    out.mkdir(parents=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(SCRIPT)]
    if processes > 1:
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={processes}",
            str(SCRIPT),
        ]
    command += [str(out), str(batch), str(steps), json.dumps(options), kind]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(out / "result.pt")


CASES = {
    "pairs": ({}, "text-pair"),
    "triplets, tiled, cached, Matryoshka": (
        {"text_chunk_size": 3, "image_chunk_size": 2, "matryoshka": [40, 16], "loss_form": "tiled"}, "text-triplet",
    ),
    "sigmoid, cached, accumulated": (
        {"text_chunk_size": 4, "image_loss": "sigmoid", "gradient_accumulation_steps": 2}, "text-pair",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one(case, processor, tmp_path):
    options, kind = CASES[case]
    processor.save_pretrained(tmp_path / "processor")
    one = run(tmp_path / "one", 1, 8, options, kind)
    two = run(tmp_path / "two", 2, 4, options, kind)
    assert len(one["losses"]) == 20
    torch.testing.assert_close(two["losses"], one["losses"], atol=1e-5, rtol=1e-5)
    assert two["eval"] == pytest.approx(one["eval"], abs=1e-5)
    assert len(one["gradients"]) > 30
    for part in ("gradients", "weights"):
        for name, value in one[part].items():
            torch.testing.assert_close(two[part][name], value, atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    moved = max(float((value - one["weights"][name]).abs().max()) for name, value in two["weights"].items())
    assert moved < 1e-5


def test_sharded_weights_give_the_same_gradients(processor, tmp_path):
    """FSDP 2 by torch itself: accelerate shards on accelerators only."""
    processor.save_pretrained(tmp_path / "processor")
    script = str(SCRIPT.with_name("run_sharded.py"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", script]
    results = []
    for command, processes in (([sys.executable, script], 1), (torchrun, 2)):
        done = subprocess.run(
            [*command, str(tmp_path), str(processes)], capture_output=True, text=True, env=environment, timeout=200,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        results.append(torch.load(tmp_path / f"sharded-{processes}.pt"))
    one, two = results
    assert two["loss"] == pytest.approx(one["loss"], abs=1e-5)
    for name, value in one["gradients"].items():
        torch.testing.assert_close(two["gradients"][name], value, atol=1e-5, rtol=1e-5)
