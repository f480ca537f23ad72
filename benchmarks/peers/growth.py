"""How the cost grows with text length, batch size and processes, and what that means for the paper's stage 1 on paper.

Prints one JSON line: milliseconds measured, the exponent of a fitted power law (of the upper half of the points), and
the days that stage 1 of the paper (32,768 pairs of each kind, 60,000 steps, base size) would take, from its floating
point operations and stated assumptions; those are arithmetic, not measurements. With --plot also a picture.

    python benchmarks/peers/growth.py [--width 128] [--layers 2] [--longest 8192] [--largest 32768] [--plot FILE.png]
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

# The assumptions of the extrapolation: dense bfloat16 peak of an A100, and the share of it that such training reaches.
PEAK, SHARE = 312e12, 0.4
STEPS, PAIRS, TOKENS, PATCHES = 60_000, 32_768, 77, 197
TEXT_PARAMETERS, IMAGE_PARAMETERS = 113e6, 86e6  # that are multiplied with; embeddings are looked up


def best(call: Callable[[], Any]) -> float:
    """Milliseconds of the fastest of some calls after one that warms up: of at least two, and of a second in all."""
    call()
    times: list[float] = []
    while len(times) < 2 or (sum(times) < 1000 and len(times) < 50):
        started = time.perf_counter()
        call()
        times.append(1000 * (time.perf_counter() - started))
    return min(times)


def power_law(points: dict[int, float]) -> tuple[list[int], float, float]:
    """time = factor * size^exponent, by least squares over the upper half of the sizes: (sizes, exponent, factor)."""
    sizes = sorted(points)[len(points) // 2 :]
    exponent, log_factor = np.polyfit(np.log(sizes), np.log([points[size] for size in sizes]), 1)
    return sizes, float(exponent), float(np.exp(log_factor))


def by_length(given: argparse.Namespace) -> dict[int, float]:
    """Embedding one text of so many tokens."""
    model = model_of(given.width, given.layers, 32).eval()
    points = {}
    length = 64
    while length <= given.longest:
        ids = torch.randint(5, 1000, (1, length))
        with torch.no_grad():
            points[length] = best(lambda ids=ids: model.get_text_features(ids))
        length *= 2
    return points


def by_batch(given: argparse.Namespace) -> dict[int, float]:
    """The contrastive loss of so many pairs, forward and backward, towers aside: what grows with the square."""
    from bifocal.training.losses import info_nce

    points = {}
    batch = 64
    while batch <= given.largest:
        left = torch.nn.functional.normalize(torch.randn(batch, 128), dim=-1).requires_grad_()
        right = torch.nn.functional.normalize(torch.randn(batch, 128), dim=-1).requires_grad_()
        points[batch] = best(lambda a=left, b=right: info_nce(a, b, 0.05).backward())
        batch *= 2
    return points


def training(given: argparse.Namespace, processes: int) -> float:
    """Seconds of a step of 64 pairs of each kind in all, in one process or two."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = command if processes > 1 else [sys.executable]
    size = ["--width", str(given.width), "--layers", str(given.layers)]
    done = subprocess.run(
        [*command, __file__, *size, "--step", str(64 // processes)], stdout=subprocess.PIPE, text=True, check=True
    )
    return float(done.stdout.strip().splitlines()[-1])


def step(given: argparse.Namespace) -> None:
    import tempfile

    from common import processor_of
    from trainers import _clock, rows

    from bifocal.training.arguments import BifocalTrainingArguments
    from bifocal.training.tasks import Task
    from bifocal.training.trainer import MultiTaskTrainer

    pictures, pairs = rows(64, 6)
    with tempfile.TemporaryDirectory() as scratch:
        args = BifocalTrainingArguments(
            output_dir=scratch, max_steps=6, save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True
        )
        clock = _clock()
        tasks = [Task("pictures", "image-text", pictures, given.step), Task("pairs", "text-pair", pairs, given.step)]
        MultiTaskTrainer(
            model_of(given.width, given.layers, 112), args, tasks, processor_of(112), 64, callbacks=[clock]
        ).train()
        if args.process_index == 0:
            print(min(clock.times[1:]))


def on_paper() -> dict[str, float]:
    """Days of stage 1 by number of GPUs.

    A forward and backward pass costs 6 operations for each parameter and token, the gradient cache another forward
    pass, 2; a step embeds 32,768 pictures, their captions, and 32,768 pairs of texts. The loss is left out (less than
    1 %), and scaling over GPUs is taken as perfect.
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
    parser.add_argument("--plot", help="file of a picture")
    parser.add_argument("--step", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.step:
        step(given)
        return
    length, batch = by_length(given), by_batch(given)
    one, two = training(given, 1), training(given, 2)
    line = {
        "benchmark": "peers/growth", "width": given.width, "layers": given.layers,
        "ms_by_length": {size: round(value, 1) for size, value in length.items()},
        "length_exponent": round(power_law(length)[1], 2),
        "ms_by_batch": {size: round(value, 1) for size, value in batch.items()},
        "batch_exponent": round(power_law(batch)[1], 2),
        "step_seconds": {"1 process": round(one, 3), "2 processes": round(two, 3), "ratio": round(two / one, 2)},
        "on_paper_days": on_paper(), "assumptions": f"{PEAK / 1e12:.0f} TFLOP/s peak, {SHARE:.0%} of it reached",
    }  # fmt: skip
    if given.plot:
        draw(length, batch, given.plot)
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
