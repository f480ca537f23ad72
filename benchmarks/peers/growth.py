"""Growth of the cost with text length, batch size and processes, and an estimate for stage 1 of the paper.

Run: python benchmarks/peers/growth.py [--width 128] [--layers 2] [--longest 8192] [--largest 32768] [--plot FILE.png]

Prints one JSON line: measured milliseconds, the exponent of a power law fitted to the upper half of the points, and the
days that stage 1 of the paper (32,768 pairs of each kind, 60,000 steps, base size) would take. The days are computed
from floating point operations and stated assumptions, not measured. --plot also draws the measurements.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from common import model_of

# The assumptions of the extrapolation: dense bfloat16 peak of an A100, and the share that such training reaches.
PEAK, SHARE = 312e12, 0.4
STEPS, PAIRS, TOKENS, PATCHES = 60_000, 32_768, 77, 197
TEXT_PARAMETERS, IMAGE_PARAMETERS = 113e6, 86e6  # without embeddings, which are looked up


def best(call: Callable[[], Any]) -> float:
    """Return the milliseconds of the fastest call: of at least two after a warm-up, and up to a second in total."""
    call()
    times: list[float] = []
    while len(times) < 2 or (sum(times) < 1000 and len(times) < 50):
        started = time.perf_counter()
        call()
        times.append(1000 * (time.perf_counter() - started))
    return min(times)


def power_law(points: dict[int, float]) -> tuple[list[int], float, float]:
    """Fit time = factor * size^exponent by least squares; return the upper half of the sizes, exponent and factor."""
    sizes = sorted(points)[len(points) // 2 :]
    exponent, log_factor = np.polyfit(np.log(sizes), np.log([points[size] for size in sizes]), 1)
    return sizes, float(exponent), float(np.exp(log_factor))


def by_length(options: argparse.Namespace) -> dict[int, float]:
    """Return the milliseconds of embedding a text by number of tokens."""
    model = model_of(options.width, options.layers, 32).eval()
    points = {}
    length = 64
    while length <= options.longest:
        ids = torch.randint(5, 1000, (1, length))
        with torch.no_grad():
            points[length] = best(lambda ids=ids: model.get_text_features(ids))
        length *= 2
    return points


def by_batch(options: argparse.Namespace) -> dict[int, float]:
    """Return the milliseconds of the loss alone, forward and backward, by number of pairs."""
    from bifocal.training.losses import info_nce

    points = {}
    batch = 64
    while batch <= options.largest:
        left = torch.nn.functional.normalize(torch.randn(batch, 128), dim=-1).requires_grad_()
        right = torch.nn.functional.normalize(torch.randn(batch, 128), dim=-1).requires_grad_()
        points[batch] = best(lambda a=left, b=right: info_nce(a, b, 0.05).backward())
        batch *= 2
    return points


def training(options: argparse.Namespace, processes: int) -> float:
    """Return the seconds of a step of 64 pairs of each kind, in one process or two."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = command if processes > 1 else [sys.executable]
    size = ["--width", str(options.width), "--layers", str(options.layers)]
    process = subprocess.run(
        [*command, __file__, *size, "--step", str(64 // processes)], stdout=subprocess.PIPE, text=True, check=True
    )
    return float(process.stdout.strip().splitlines()[-1])


def step(options: argparse.Namespace) -> None:
    import tempfile

    from common import processor_of
    from trainers import _clock, rows

    from bifocal.training.arguments import BifocalTrainingArguments
    from bifocal.training.tasks import Task
    from bifocal.training.trainer import MultiTaskTrainer

    images, pairs = rows(64, 6)
    with tempfile.TemporaryDirectory() as scratch:
        args = BifocalTrainingArguments(
            output_dir=scratch, max_steps=6, save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True
        )
        clock = _clock()
        tasks = [Task("images", "image-text", images, options.step), Task("pairs", "text-pair", pairs, options.step)]
        MultiTaskTrainer(
            model_of(options.width, options.layers, 112), args, tasks, processor_of(112), 64, callbacks=[clock]
        ).train()
        if args.process_index == 0:
            print(min(clock.times[1:]))


def on_paper() -> dict[str, float]:
    """Return the estimated days of stage 1 by number of GPUs.

    Forward and backward pass cost 6 operations per parameter and token; the gradient cache adds a forward pass, 2. A
    step embeds 32,768 images, their captions, and 32,768 pairs of texts. The loss is ignored (less than 1 %), and
    scaling over GPUs is assumed to be perfect.
    """
    tokens = PAIRS * (3 * TOKENS * TEXT_PARAMETERS + PATCHES * IMAGE_PARAMETERS)
    operations = STEPS * 8 * tokens
    return {
        f"{gpus} GPU{'s' * (gpus > 1)}": round(operations / (gpus * PEAK * SHARE) / 86400, 1) for gpus in (1, 8, 64)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("width", 128), ("layers", 2), ("longest", 8192), ("largest", 32768)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--plot", help="image file")
    parser.add_argument("--step", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        step(options)
        return
    length, batch = by_length(options), by_batch(options)
    one, two = training(options, 1), training(options, 2)
    line = {
        "benchmark": "peers/growth", "width": options.width, "layers": options.layers,
        "ms_by_length": {size: round(value, 1) for size, value in length.items()},
        "length_exponent": round(power_law(length)[1], 2),
        "ms_by_batch": {size: round(value, 1) for size, value in batch.items()},
        "batch_exponent": round(power_law(batch)[1], 2),
        "step_seconds": {"1 process": round(one, 3), "2 processes": round(two, 3), "ratio": round(two / one, 2)},
        "on_paper_days": on_paper(), "assumptions": f"{PEAK / 1e12:.0f} TFLOP/s peak, {SHARE:.0%} reached",
    }  # fmt: skip
    if options.plot:
        draw(length, batch, options.plot)
    print(json.dumps(line))


def draw(length: dict[int, float], batch: dict[int, float], path: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    parts = [(length, "Embedding one text", "tokens"), (batch, "The loss, forward and backward", "pairs of a batch")]
    for axes, (points, title, label) in zip(figure.subplots(1, 2), parts):
        axes.loglog(list(points), list(points.values()), "o", color="#2f6db3", label="measured")
        sizes, exponent, factor = power_law(points)
        fitted = [factor * size**exponent for size in sizes]
        axes.loglog(sizes, fitted, "-", color="#b3552f", label=f"power law, exponent {exponent:.2f}")
        ticks = list(points)[::2] if len(points) > 8 else list(points)
        axes.set_xticks(ticks, [f"{size:,}" for size in ticks])
        axes.minorticks_off()
        axes.set_xlabel(label)
        axes.set_ylabel("milliseconds")
        axes.set_title(title, fontsize=10)
        axes.legend(frameon=False, fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
