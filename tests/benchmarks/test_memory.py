"""The memory of a long text: two layers of base size, since a layer's memory is given back before the next one."""

import json
from pathlib import Path

import pytest

from tests.processes import run

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "long_text_memory.py"


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from /proc, which is Linux's")
def test_8192_tokens_stay_below_two_gib():
    done = run(SCRIPT, "--one", "blocks", "--layers", "2")
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout.splitlines()[-1])
    # A whole bias alone would be 12 x 8,192 x 8,192 x 4 bytes = 3 GiB.
    assert 0 < measured["bytes"] < 2 * 2**30


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from /proc, which is Linux's")
@pytest.mark.parametrize("way", ["blocks", "none"])
def test_a_training_step_is_measured_with_and_without_a_bias(way):
    done = run(SCRIPT, "--train", "--one", way, "--layers", "1", "--tokens", "128", "--batch", "2")
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout.splitlines()[-1])
    assert measured["bytes"] > 4 * 2 * 128 * 6144  # the feed-forward's activations alone
    assert measured["cpu_seconds"] > 0


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from /proc, which is Linux's")
def test_the_tiled_loss_holds_no_matrix():
    """At 4,096 rows the matrix alone is 64 MiB; the plain form holds several."""
    script = SCRIPT.with_name("contrastive_loss.py")
    found = {}
    for way in ("plain", "tiled"):
        done = run(script, "--one", way, "4096", "1", "--dimensions", "64")
        assert done.returncode == 0, done.stderr
        found[way] = json.loads(done.stdout.splitlines()[-1])["mib"]
    assert found["tiled"] < 64 < 128 < found["plain"]


def test_the_benchmark_of_the_gradient_cache_runs():
    done = run(SCRIPT.with_name("gradient_cache.py"), "--width", "64", "--layers", "1", "--one", "8", "4", "1")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["mib"] > 0
