"""Time and memory of InfoNCE, forward and backward: plain, tiled, chosen by size, sentence-transformers' cached loss.

Run: python benchmarks/contrastive_loss.py [--rows 64 256 1024 4096 16384] [--largest 32768] [--dimensions 768]

All figures come from one run; ratios are against the plain loss of the same number of rows. Memory is the peak of a
separate process above inputs and gradients, read from /proc (Linux only).
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
    """Return the loss (sum of both directions) as a function of both sides and the temperature."""
    if way == "plain":  # as in CLIP's training code

        def plain(a: torch.Tensor, b: torch.Tensor, tau: torch.Tensor) -> torch.Tensor:
            logits, targets = a @ b.t() / tau, torch.arange(len(a))
            return cross_entropy(logits, targets) + cross_entropy(logits.t(), targets)

        return plain
    if way.startswith("cached"):
        from sentence_transformers.sentence_transformer import losses

        class NoModel(torch.nn.Module):
            def __getitem__(self, module: int) -> torch.nn.Module:
                return torch.nn.Identity()

        cached_loss = losses.CachedMultipleNegativesRankingLoss(
            NoModel(), scale=1 / 0.07, mini_batch_size=int(way.split()[1]), directions=("query_to_doc", "doc_to_query"),
            partition_mode="per_direction",
        )  # fmt: skip
        # The loop of its cached step, which computes gradients with respect to the embeddings on the way.
        return lambda a, b, tau: cached_loss.calculate_loss([[a], [b]], with_backward=True)
    from bifocal.training.losses import info_nce

    return lambda a, b, tau: info_nce(a, b, tau, impl=way)


def measure(way: str, rows: int, dimensions: int, repeats: int) -> dict[str, float]:
    torch.manual_seed(0)
    a, b = (normalize(torch.randn(rows, dimensions), dim=1).requires_grad_() for _ in range(2))
    tau = torch.tensor(0.07, requires_grad=not way.startswith("cached"))
    for side in (a, b):
        side.grad = torch.zeros_like(side)
    loss = loss_of(way)
    small = [side.detach()[:64].clone().requires_grad_() for side in (a, b)]
    _step(loss, *small, tau, way)  # one-time set-up
    before = memory("VmRSS")
    restart_peak()
    _step(loss, a, b, tau, way)
    peak = memory("VmHWM") - before
    fastest = min(_step(loss, a, b, tau, way) for _ in range(repeats))
    return {"seconds": fastest, "mib": peak / MIB}


def _step(loss: Callable[..., torch.Tensor], a: Any, b: Any, tau: torch.Tensor, way: str) -> float:
    started = time.perf_counter()
    value = loss(a, b, tau)
    if not way.startswith("cached"):
        value.backward()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[64, 256, 1024, 2048, 4096, 16384])
    parser.add_argument("--largest", type=int, default=32768, help="rows of the last line, tiled only")
    parser.add_argument("--dimensions", type=int, default=768)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        way, rows, repeats = options.one[0], int(options.one[1]), int(options.one[2])
        print(json.dumps(measure(way, rows, options.dimensions, repeats)))
        return

    def run(way: str, rows: int) -> dict[str, float]:
        repeats = max(1, min(200, 2**22 // rows**2 * 8))
        process = subprocess.run(
            [sys.executable, __file__, "--one", way, str(rows), str(repeats), "--dimensions", str(options.dimensions)],
            stdout=subprocess.PIPE, check=True,
        )  # fmt: skip
        return json.loads(process.stdout.splitlines()[-1])

    for rows in options.rows:
        rounds = [{way: run(way, rows) for way in WAYS} for _ in range(1 if rows > 8192 else 3)]  # in turn
        best = {way: min((r[way] for r in rounds), key=lambda one: one["seconds"]) for way in WAYS}
        line: dict[str, Any] = {"benchmark": "contrastive_loss", "rows": rows, "dimensions": options.dimensions}
        for way in WAYS:
            line[f"{way} seconds"] = round(best[way]["seconds"], 5)
            line[f"{way} MiB"] = round(best[way]["mib"], 1)
        line["auto time over plain"] = round(best["auto"]["seconds"] / best["plain"]["seconds"], 3)
        line["tiled time over plain"] = round(best["tiled"]["seconds"] / best["plain"]["seconds"], 3)
        line["tiled memory over plain"] = round(best["tiled"]["mib"] / max(best["plain"]["mib"], 0.1), 3)
        line["cached time over tiled"] = round(best["cached 256"]["seconds"] / best["tiled"]["seconds"], 2)
        print(json.dumps(line), flush=True)
    if options.largest:
        last = run("tiled", options.largest)
        line = {"benchmark": "contrastive_loss", "rows": options.largest, "dimensions": options.dimensions}
        print(json.dumps(line | {"tiled seconds": round(last["seconds"], 2), "tiled MiB": round(last["mib"], 1)}))


if __name__ == "__main__":
    main()
