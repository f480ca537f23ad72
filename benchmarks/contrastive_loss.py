"""Time and memory of InfoNCE, forward and backward: plain, tiled, chosen by size, sentence-transformers' cached loss.

All figures come from one run; ratios are against the plain form of the same number of rows. Memory is the peak of a
process of its own above inputs and gradients, read from /proc (Linux only).

    python benchmarks/contrastive_loss.py [--rows 64 256 1024 4096 16384] [--largest 32768] [--dimensions 768]
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from process_memory import memory, restart_peak
from torch.nn.functional import cross_entropy, normalize

MIB = 2**20
WAYS = ("plain", "auto", "tiled", "cached 256")


def loss_of(way: str) -> Callable[..., torch.Tensor]:
    """The loss (sum of both directions) as a function of two tile_slices and the temperature."""
    if way == "plain":  # as CLIP's trainers write it

        def plain(a: torch.Tensor, b: torch.Tensor, tau: torch.Tensor) -> torch.Tensor:
            logits, targets = a @ b.t() / tau, torch.arange(len(a))
            return cross_entropy(logits, targets) + cross_entropy(logits.t(), targets)

        return plain
    if way.startswith("cached"):
        from sentence_transformers.sentence_transformer import losses

        class Given(torch.nn.Module):
            def __getitem__(self, module: int) -> torch.nn.Module:
                return torch.nn.Identity()

        theirs = losses.CachedMultipleNegativesRankingLoss(
            Given(), scale=1 / 0.07, mini_batch_size=int(way.split()[1]), directions=("query_to_doc", "doc_to_query"),
            partition_mode="per_direction",
        )  # fmt: skip
        # The very loop of their cached step, which takes gradients with respect to the embeddings as it goes.
        return lambda a, b, tau: theirs.calculate_loss([[a], [b]], with_backward=True)
    from bifocal.training.losses import info_nce

    return lambda a, b, tau: info_nce(a, b, tau, impl=way)


def measured(way: str, rows: int, dimensions: int, repeats: int) -> dict[str, float]:
    torch.manual_seed(0)
    a, b = (normalize(torch.randn(rows, dimensions), dim=1).requires_grad_() for _ in range(2))
    tau = torch.tensor(0.07, requires_grad=not way.startswith("cached"))
    for side in (a, b):
        side.grad = torch.zeros_like(side)
    loss = loss_of(way)
    small = [side.detach()[:64].clone().requires_grad_() for side in (a, b)]
    _step(loss, *small, tau, way)  # whatever the first call sets up once
    before = memory("VmRSS")
    restart_peak()
    _step(loss, a, b, tau, way)
    peak = memory("VmHWM") - before
    best = min(_step(loss, a, b, tau, way) for _ in range(repeats))
    return {"seconds": best, "mib": peak / MIB}


def _step(loss: Callable[..., torch.Tensor], a: Any, b: Any, tau: torch.Tensor, way: str) -> float:
    started = time.perf_counter()
    value = loss(a, b, tau)
    if not way.startswith("cached"):
        value.backward()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[64, 256, 1024, 2048, 4096, 16384])
    parser.add_argument("--largest", type=int, default=32768, help="rows of a last line, tiled alone")
    parser.add_argument("--dimensions", type=int, default=768)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        way, rows, repeats = given.one[0], int(given.one[1]), int(given.one[2])
        print(json.dumps(measured(way, rows, given.dimensions, repeats)))
        return

    def run(way: str, rows: int) -> dict[str, float]:
        repeats = max(1, min(200, 2**22 // rows**2 * 8))
        done = subprocess.run(
            [sys.executable, __file__, "--one", way, str(rows), str(repeats), "--dimensions", str(given.dimensions)],
            stdout=subprocess.PIPE, check=True,
        )  # fmt: skip
        return json.loads(done.stdout.splitlines()[-1])

    for rows in given.rows:
        rounds = [{way: run(way, rows) for way in WAYS} for _ in range(1 if rows > 8192 else 3)]  # in turn
        found = {way: min((r[way] for r in rounds), key=lambda one: one["seconds"]) for way in WAYS}
        line: dict[str, Any] = {"benchmark": "contrastive_loss", "rows": rows, "dimensions": given.dimensions}
        for way in WAYS:
            line[f"{way} seconds"] = round(found[way]["seconds"], 5)
            line[f"{way} MiB"] = round(found[way]["mib"], 1)
        line["auto time over plain"] = round(found["auto"]["seconds"] / found["plain"]["seconds"], 3)
        line["tiled time over plain"] = round(found["tiled"]["seconds"] / found["plain"]["seconds"], 3)
        line["tiled memory over plain"] = round(found["tiled"]["mib"] / max(found["plain"]["mib"], 0.1), 3)
        line["cached time over tiled"] = round(found["cached 256"]["seconds"] / found["tiled"]["seconds"], 2)
        print(json.dumps(line), flush=True)
    if given.largest:
        found = run("tiled", given.largest)
        line = {"benchmark": "contrastive_loss", "rows": given.largest, "dimensions": given.dimensions}
        print(json.dumps(line | {"tiled seconds": round(found["seconds"], 2), "tiled MiB": round(found["mib"], 1)}))


if __name__ == "__main__":
    main()
