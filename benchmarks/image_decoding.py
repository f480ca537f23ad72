"""Decoding and resizing a JPEG at reduced scale, against CLIP's processor on the whole image.

Run: python benchmarks/image_decoding.py [--rounds 7]

Prints one JSON line per size: the ratio of times on one core, both measured in turn, and the mean difference of the
pixels as a share of their range. The images are generated: noise with the frequency spectrum of photos, slightly
blurred, in JPEG at quality 90.
"""

import argparse
import io
import json
import statistics
import time

import numpy as np
import torch
from PIL import Image, ImageFilter

from bifocal.data.images import ImageReader
from bifocal.modeling.processing_bifocal import image_processor_of_size

SIDE = 224


def photo(width: int, height: int) -> bytes:
    draw = np.random.default_rng(0)
    radius = np.maximum(np.hypot(np.fft.rfftfreq(width)[None], np.fft.fftfreq(height)[:, None]), 1 / width)
    light = np.fft.irfft2(np.fft.rfft2(draw.standard_normal((height, width))) / radius, s=(height, width))
    planes = []
    for _ in range(3):  # colour varies less than brightness
        own = np.fft.irfft2(np.fft.rfft2(draw.standard_normal((height, width))) / radius, s=(height, width))
        plane = light / light.std() + 0.3 * own / own.std()
        planes.append(128 + 45 * plane)
    image = Image.fromarray(np.stack(planes, -1).clip(0, 255).astype(np.uint8))
    buffer = io.BytesIO()
    image.filter(ImageFilter.GaussianBlur(width / 4000)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    clip = image_processor_of_size(SIDE)
    reader = ImageReader(clip)

    def usual(content: bytes) -> torch.Tensor:
        return clip([Image.open(io.BytesIO(content)).convert("RGB")], return_tensors="pt")["pixel_values"]

    def reduced(content: bytes) -> torch.Tensor:
        return reader.pixels([reader.decode(content)])

    for size, repeats in (((500, 375), 40), ((4000, 3000), 3)):
        content = photo(*size)
        times: dict[str, list[float]] = {"usual": [], "reduced": []}
        for _ in range(rounds):
            for name, way in (("usual", usual), ("reduced", reduced)):
                start = time.perf_counter()
                for _ in range(repeats):
                    way(content)
                times[name].append((time.perf_counter() - start) / repeats)
        ratios = [a / b for a, b in zip(times["usual"], times["reduced"], strict=True)]
        difference = (usual(content) - reduced(content)) * torch.tensor(clip.image_std).view(3, 1, 1)
        line = {
            "benchmark": "image_decoding", "size": size, "kilobytes": len(content) // 1024,
            "ratio": round(statistics.median(ratios), 2), "ratios": [round(ratio, 2) for ratio in ratios],
            "milliseconds": {name: round(1000 * min(each), 2) for name, each in times.items()},
            "mean_difference": float(f"{difference.abs().mean():.1e}"),
        }  # fmt: skip
        print(json.dumps(line))


if __name__ == "__main__":
    main()
