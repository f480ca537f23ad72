"""The memory of a long text: two layers of base size, since a layer's memory is given back before the next one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "long_text_memory.py"


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from /proc, which is Linux's")
def test_8192_tokens_stay_below_two_gib():
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--one", "blocks", "--layers", "2"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout.splitlines()[-1])
    # A whole bias alone would be 12 x 8,192 x 8,192 x 4 bytes = 3 GiB.
    assert 0 < measured["bytes"] < 2 * 2**30
