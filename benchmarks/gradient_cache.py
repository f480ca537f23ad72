"""Memory and time of the gradient cache: a batch of 1,024 in chunks of 32 against a plain step of 32.

Run: python benchmarks/gradient_cache.py [--batch 1024] [--chunk 32] [--width 384] [--layers 6]

Prints one JSON line. Peak memory is that of a separate process with weights and inputs, read from /proc (Linux only).
Time per sample is compared at 64 samples, where both fit.
"""

import argparse
import json
import subprocess
import sys
import time
from contextlib import nullcontext

import torch
from process_memory import memory

MIB = 2**20
TOKENS = 64


def measure(batch: int, chunk: int | None, width: int, layers: int, repeats: int) -> dict[str, float]:
    from bifocal.modeling import BifocalConfig, BifocalModel
    from bifocal.training.engine.gradient_cache import cached_step, into_chunks
    from bifocal.training.engine.joint_forward import embed
    from bifocal.training.losses import info_nce

    torch.manual_seed(0)
    size = dict(hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 64)
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

    def objective(embedded: dict[str, torch.Tensor]) -> torch.Tensor:
        return info_nce(embedded["texts"], embedded["images"], 1.0 / embedded["scale"])

    def step() -> None:
        if chunk is None:
            objective(embed(model, texts, images)).backward()
        else:
            cached_step(
                into_chunks(texts, images, chunk, chunk),
                lambda t, i: embed(model, t, i),
                objective,
                lambda scalar: scalar.backward(),
                nullcontext,
            )
        optimizer.step()
        optimizer.zero_grad()

    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        step()
        times.append(time.perf_counter() - started)
    return {"seconds": min(times), "mib": memory("VmHWM") / MIB, "inputs_mib": batch * 3 * 224 * 224 * 4 / MIB}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("batch", 1024), ("chunk", 32), ("width", 384), ("layers", 6), ("both", 64)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--one", nargs=3, type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        batch, chunk, repeats = options.one
        print(json.dumps(measure(batch, chunk or None, options.width, options.layers, repeats)))
        return

    def run(batch: int, chunk: int, repeats: int) -> dict[str, float]:
        size = ["--width", str(options.width), "--layers", str(options.layers)]
        process = subprocess.run(
            [sys.executable, __file__, *size, "--one", str(batch), str(chunk), str(repeats)],
            stdout=subprocess.PIPE, check=True,
        )  # fmt: skip
        return json.loads(process.stdout.splitlines()[-1])

    plain_small = run(options.chunk, 0, 2)
    cached_large = run(options.batch, options.chunk, 1)
    ratios, line = [], {}
    for _ in range(3):  # in turn
        plain, cached = run(options.both, 0, 2), run(options.both, options.chunk, 2)
        ratios.append(cached["seconds"] / plain["seconds"])
    line = {
        "benchmark": "gradient_cache", "batch": options.batch, "chunk": options.chunk, "width": options.width,
        "layers": options.layers, "plain_mib": round(plain_small["mib"]), "cached_mib": round(cached_large["mib"]),
        "inputs_mib": round(cached_large["inputs_mib"]),
        "memory_ratio": round(cached_large["mib"] / plain_small["mib"], 3),
        "compared_at": options.both, "time_ratio": round(sorted(ratios)[1], 3),
        "time_ratios": [round(ratio, 3) for ratio in ratios],
    }  # fmt: skip
    print(json.dumps(line))


if __name__ == "__main__":
    main()
