"""bfloat16 against float32: time of a training step and of encoding, and the cosines between both ways' vectors.

Run: python benchmarks/dtypes.py [--width 384] [--layers 6] [--texts 256] [--images 64] [--rows 128] [--rounds 3]

Prints one JSON line. Each time is the best of several rounds in which both dtypes take turns. A step embeds `--rows`
texts of 64 tokens and as many images with gradients, for bfloat16 in autocast over float32 weights. The weights are
random. Where the device does not multiply in bfloat16 (`"hardware": false`), only the cosines mean something.
"""

import argparse
import copy
import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image

from bifocal.modeling import BifocalConfig, BifocalModel, BifocalProcessor
from bifocal.modeling.dtype_bifocal import default_device, multiplies_in_bfloat16
from bifocal.modeling.processing_bifocal import image_processor_of_size
from bifocal.training.losses import info_nce
from bifocal.training.tokenizer import train_wordpiece

TOKENS = 64


def build(width: int, layers: int) -> BifocalModel:
    torch.manual_seed(0)
    size = dict(hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 64)
    config = BifocalConfig(
        text_config={**size, "intermediate_size": 4 * width},
        vision_config={**size, "intermediate_size": 8 * width // 3},
        projection_dim=width,
    )
    return BifocalModel(config).to(default_device()).eval()


def samples(texts: int, images: int) -> tuple[list[str], list[Image.Image]]:
    """Return texts of 4 to 300 words, and smooth images, whose patches differ less than noise does."""
    draw = np.random.default_rng(0)
    words = ["".join(draw.choice(list("abcdefghijklmnopqrst"), draw.integers(2, 9))) for _ in range(2000)]
    lengths = np.exp(draw.uniform(np.log(4), np.log(300), texts)).astype(int)
    coarse = draw.integers(0, 256, (images, 7, 7, 3), dtype=np.uint8)
    return (
        [" ".join(draw.choice(words, length)) for length in lengths],
        [Image.fromarray(pixels).resize((224, 224), Image.Resampling.BICUBIC) for pixels in coarse],
    )


def in_turn(rounds: int, **ways: Callable[[], Any]) -> dict[str, float]:
    """Return the best time of each way."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + 1):  # the first is a warm-up
        for name, run in ways.items():
            started = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - started)
    return {name: min(values[1:]) for name, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in dict(width=384, layers=6, texts=256, images=64, rows=128, rounds=3).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    device = default_device()
    model = build(options.width, options.layers)
    texts, images = samples(options.texts, options.images)
    model.processor = BifocalProcessor(image_processor_of_size(224), train_wordpiece(texts, 8000, 512))
    half = copy.deepcopy(model).to(torch.bfloat16)
    pixels = model.processor.image_processor(images, return_tensors="pt")["pixel_values"].to(device)
    result: dict[str, Any] = {**vars(options), "device": device, "hardware": multiplies_in_bfloat16(device)}
    for what, embed in (
        ("texts", lambda one: one.encode_text(texts, batch_size=32, show_progress=False)),
        ("images", lambda one: one.get_image_features(pixels).pooler_output.float().cpu().numpy()),
    ):
        with torch.no_grad():
            first, second = embed(model), embed(half)
            cosines = (first * second).sum(-1) / np.linalg.norm(first, axis=-1) / np.linalg.norm(second, axis=-1)
            times = in_turn(options.rounds, float32=lambda: embed(model), bfloat16=lambda: embed(half))  # noqa: B023
        result[what] = {
            "smallest_cosine": round(float(cosines.min()), 6),
            "speed_up": round(times["float32"] / times["bfloat16"], 3),
            **{f"{name}_per_second": round(len(first) / seconds, 1) for name, seconds in times.items()},
        }

    model.train()
    ids = torch.randint(1000, 7000, (options.rows, TOKENS), device=device)
    batch = torch.randn(options.rows, 3, 224, 224, device=device)

    def step(autocast: bool) -> None:
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            text = model.get_text_features(ids).pooler_output
            image = model.get_image_features(batch).pooler_output
        info_nce(text.float(), image.float(), 0.05).backward()
        model.zero_grad()

    times = in_turn(options.rounds, float32=lambda: step(False), bfloat16=lambda: step(True))
    result["step"] = {
        "speed_up": round(times["float32"] / times["bfloat16"], 3),
        **{f"{name}_seconds": round(seconds, 2) for name, seconds in times.items()},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
