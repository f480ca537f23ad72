"""Memory and time of the gradient cache: chunks that keep their graph, none that does, and a direct step.

Run: python benchmarks/gradient_cache.py [--batch 1024] [--both 128] [--chunk 32] [--width 384] [--layers 6]

Prints one JSON line. Times are compared at a batch (`--both`) whose activations all fit: the ways run in turn within
one process, each in the chunks of `--chunk`, and the direct step at once. Peak memory is that of a separate process
each, with weights and inputs, read from /proc (Linux only): of the batch `--batch` against a plain step of one chunk,
and of `--both` where a bound (`graph_memory`) holds half of the chunks.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from process_memory import memory

MIB = 2**20
TOKENS = 64
WAYS = ("direct", "kept", "half", "recomputed")


def step_of(options: argparse.Namespace, batch: int) -> tuple[Callable[[str], None], dict[str, Any]]:
    """Return a function that takes one training step in a way, and the number of chunks and bytes that "half" keeps."""
    from bifocal.modeling import BifocalConfig, BifocalModel
    from bifocal.training.engine.gradient_cache import cached_step, into_chunks
    from bifocal.training.engine.graph_memory import GIB, GraphMemory
    from bifocal.training.engine.joint_forward import embed
    from bifocal.training.losses import info_nce

    torch.manual_seed(0)
    width = options.width
    size = dict(hidden_size=width, num_hidden_layers=options.layers, num_attention_heads=width // 64)
    model = BifocalModel(
        BifocalConfig(
            text_config={**size, "intermediate_size": 4 * width},
            vision_config={**size, "intermediate_size": 8 * width // 3},
            projection_dim=width,
        )
    ).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    ids = torch.randint(1000, 30000, (batch, TOKENS))
    texts = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]
    images = [{"pixel_values": torch.randn(batch, 3, 224, 224)}]
    chunks = into_chunks(texts, images, options.chunk, options.chunk)
    settings = SimpleNamespace(graph_memory=1e9, bf16=False, fp16=False)
    graphs = GraphMemory(model, settings)
    needed = sum(graphs.kept_bytes("text", t) for part, _ in chunks for t in part)
    needed += sum(graphs.kept_bytes("image", i) for _, part in chunks for i in part)
    settings.graph_memory = needed / 2 / GIB
    num_kept = {"kept": len(chunks), "half": graphs.num_kept(chunks), "recomputed": 0}

    def objective(embedded: dict[str, torch.Tensor]) -> torch.Tensor:
        return info_nce(embedded["texts"], embedded["images"], 1.0 / embedded["scale"])

    def step(way: str) -> None:
        if way == "direct":
            objective(embed(model, texts, images)).backward()
        else:
            cached_step(
                chunks, lambda t, i: embed(model, t, i), objective, lambda scalar: scalar.backward(), nullcontext,
                num_kept[way],
            )  # fmt: skip
        optimizer.step()
        optimizer.zero_grad()

    return step, {"chunks": len(chunks), "kept": num_kept["half"], "bound_mib": needed / 2 / MIB}


def times(options: argparse.Namespace) -> dict[str, list[float]]:
    """Return the seconds of each round of each way; the first round does not count."""
    step, _ = step_of(options, options.both)
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    clock = time.process_time if options.cpu_time else time.perf_counter
    for _ in range(options.rounds + 1):
        for way in WAYS:
            started = clock()
            step(way)
            seconds[way].append(clock() - started)
    return {way: values[1:] for way, values in seconds.items()}


def peak(options: argparse.Namespace, way: str, batch: int) -> dict[str, Any]:
    """Return the peak memory of two steps in a way, and what `step_of` says of "half"."""
    step, half = step_of(options, batch)
    step(way)
    step(way)
    return {"mib": memory("VmHWM") / MIB, "inputs_mib": batch * 3 * 224 * 224 * 4 / MIB, **half}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = (("batch", 1024), ("both", 128), ("chunk", 32), ("width", 384), ("layers", 6), ("rounds", 5))
    for name, default in sizes:
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--cpu-time", action="store_true", help="compare CPU time, on a machine that others use")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        way, batch = options.one
        print(json.dumps(times(options) if way == "times" else peak(options, way, int(batch))))
        return

    def run(way: str, batch: int) -> Any:
        arguments = [word for name, _ in sizes for word in (f"--{name}", str(getattr(options, name)))]
        arguments += ["--cpu-time"] * options.cpu_time
        process = subprocess.run(
            [sys.executable, __file__, *arguments, "--one", way, str(batch)], stdout=subprocess.PIPE, check=True
        )
        return json.loads(process.stdout.splitlines()[-1])

    seconds = run("times", options.both)
    ratios = {
        way: [round(ours / direct, 3) for ours, direct in zip(seconds[way], seconds["direct"], strict=True)]
        for way in WAYS[1:]
    }
    peaks = {way: run(way, options.both) for way in WAYS}
    plain_small, large = run("direct", options.chunk), run("recomputed", options.batch)
    half = peaks["half"]
    line = {
        "benchmark": "gradient_cache", "torch": torch.__version__, "threads": torch.get_num_threads(),
        "batch": options.batch, "chunk": options.chunk, "width": options.width, "layers": options.layers,
        "plain_mib": round(plain_small["mib"]), "cached_mib": round(large["mib"]),
        "inputs_mib": round(large["inputs_mib"]), "memory_ratio": round(large["mib"] / plain_small["mib"], 3),
        "compared_at": options.both, "chunks": half["chunks"],
        "time_to_direct": {way: round(statistics.median(values), 3) for way, values in ratios.items()},
        "time_ratios": ratios,
        "peak_mib": {way: round(values["mib"]) for way, values in peaks.items()},
        "half": {
            "chunks_kept": half["kept"], "bound_mib": round(half["bound_mib"]),
            "above_recomputed_mib": round(half["mib"] - peaks["recomputed"]["mib"]),
        },
    }  # fmt: skip
    print(json.dumps(line))


if __name__ == "__main__":
    main()
