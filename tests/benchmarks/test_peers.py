"""The benchmarks against peers: that encoding runs both sides in turn, and the arithmetic on paper."""

import importlib
import json
from pathlib import Path

import pytest

from tests.processes import run

PEERS = Path(__file__).parents[2] / "benchmarks" / "peers"


def test_encoding_runs():
    small = ["--texts", "6", "--images", "3", "--width", "64", "--layers", "1", "--rounds", "2"]
    done = run(PEERS / "encoding.py", *small)
    assert done.returncode == 0, done.stderr
    line = json.loads(done.stdout.splitlines()[-1])
    assert line["benchmark"] == "peers/encoding"
    for kind, peers in (("text", ("sentence-transformers", "ONNX Runtime")), ("image", ("CLIP",))):
        for peer in peers:
            ratio = line[kind]["ratios"][f"{peer} over ours"]
            assert 0 < ratio["low"] <= ratio["median"] <= ratio["high"]


def test_growth_on_paper(monkeypatch):
    monkeypatch.syspath_prepend(str(PEERS))
    growth = importlib.import_module("growth")
    sizes, exponent, factor = growth.power_law({size: 3.0 * size**1.5 for size in (64, 128, 256, 512)})
    assert (sizes, exponent, factor) == ([256, 512], pytest.approx(1.5), pytest.approx(3.0))
    days = growth.on_paper()
    # By hand: 60,000 steps of 32,768 rows, three texts of 77 tokens and an image of 197 patches in each, 8 operations
    # for each parameter and token, on cards of 124.8 TFLOP/s.
    by_hand = 60_000 * 32_768 * 8 * (3 * 77 * 113e6 + 197 * 86e6) / 124.8e12 / 86_400
    assert days["1 GPU"] == pytest.approx(by_hand, abs=0.1)
    assert days["8 GPUs"] == pytest.approx(by_hand / 8, abs=0.1)
