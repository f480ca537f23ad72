"""CPU time of the image tower when its last layer computes the class token only, against all tokens.

Run: python benchmarks/image_tower.py [--rounds 5]

Prints one JSON line. Both ways embed the same images in turn, in training (with gradients) and in inference, with the
image tower of the demo (3 layers of width 128, 256 images of 32 pixels) and one of 6 layers of width 384 (16 images of
224 pixels). Each time is the best of all rounds, on one thread.
"""

import argparse
import json
import time
from typing import Any

import torch

from bifocal.modeling import BifocalVisionConfig, BifocalVisionModel
from bifocal.training.recipe import find_recipe, load_recipe


def embed(tower: Any, pixels: torch.Tensor, pooled_only: bool) -> tuple[float, torch.Tensor]:
    """Return the CPU time of a pass, with gradients if the tower trains, and the images' states."""
    start = time.process_time()
    with torch.set_grad_enabled(tower.training):
        states = tower(pixels, pooled_only=pooled_only).pooler_output
        if tower.training:
            states.square().sum().backward()
    return time.process_time() - start, states.detach()


def compare(tower: Any, pixels: torch.Tensor, rounds: int) -> dict[str, float]:
    seconds: dict[bool, list[float]] = {False: [], True: []}
    states = {}
    for _ in range(rounds):
        for pooled_only in (False, True):
            taken, states[pooled_only] = embed(tower, pixels, pooled_only)
            seconds[pooled_only].append(taken)
    every, pooled = min(seconds[False]), min(seconds[True])
    return {
        "all_tokens_s": round(every, 4), "class_token_s": round(pooled, 4), "ratio": round(every / pooled, 3),
        "difference": float((states[True] - states[False]).abs().max()),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    wide = dict(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=6, intermediate_size=1024, image_size=224,
        patch_size=16, patch_dropout=0.0,
    )  # fmt: skip
    demo = load_recipe(find_recipe("demo/stage1")).model["vision_config"]
    line: dict[str, Any] = {"benchmark": "image_tower"}
    for name, settings, count in (("demo", demo, 256), ("6 x 384", wide, 16)):
        torch.manual_seed(0)
        tower = BifocalVisionModel(BifocalVisionConfig(**settings))
        pixels = torch.randn(count, 3, settings["image_size"], settings["image_size"])
        line[name] = {
            "training": compare(tower.train(), pixels, options.rounds),
            "inference": compare(tower.eval(), pixels, options.rounds),
        }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
