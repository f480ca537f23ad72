"""Helpers of the benchmarks against peers: models, generated data, runs in turn."""

import io
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))  # the benchmarks' own helpers

from process_memory import memory

__all__ = ["memory", "model_of", "photos", "processor_of", "run_in_turn", "spread", "texts"]
WORDS = Path(__file__).read_text(encoding="utf-8").lower().replace("\n", " ").split()
LETTERS = sorted({word.strip(".,:()[]\"'`") for word in WORDS if word.isascii()} - {""})


def processor_of(side: int) -> Any:
    from bifocal.modeling import BifocalProcessor
    from bifocal.modeling.processing_bifocal import image_processor_of_size
    from bifocal.training.tokenizer import train_wordpiece

    tokenizer = train_wordpiece(LETTERS * 5, 1000, 512)
    images = image_processor_of_size(side)
    return BifocalProcessor(images, tokenizer)


def model_of(width: int, layers: int, side: int, patch: int = 16) -> Any:
    """Return a Bifocal model with random weights from a fixed seed."""
    from bifocal.modeling import BifocalConfig, BifocalModel

    torch.manual_seed(0)
    tower = dict(hidden_size=width, num_hidden_layers=layers, num_attention_heads=max(1, width // 64))
    text = {**tower, "vocab_size": 1024, "intermediate_size": 4 * width, "max_position_embeddings": 8192}
    vision = {
        **tower,
        "intermediate_size": 8 * width // 3,
        "image_size": side,
        "patch_size": patch,
        "patch_dropout": 0.0,
    }
    return BifocalModel(BifocalConfig(text_config=text, vision_config=vision, projection_dim=width))


def texts(count: int, median: int, longest: int, seed: int = 0) -> list[str]:
    """Return texts with log-normal numbers of words."""
    draws = np.random.default_rng(seed)
    lengths = np.clip(np.exp(draws.normal(np.log(median), 0.7, count)).astype(int), 4, longest)
    return [" ".join(draws.choice(LETTERS, length)) for length in lengths]


def photos(count: int, width: int, height: int, seed: int = 0) -> list[bytes]:
    """Return JPEG files of coarse noise, which have about the size of photos."""
    draws = np.random.default_rng(seed)
    files = []
    for _ in range(count):
        coarse = draws.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=90)
        files.append(buffer.getvalue())
    return files


def run_in_turn(
    script: str, ways: Sequence[str], rounds: int, options: Sequence[str]
) -> dict[str, list[dict[str, Any]]]:
    """Return what each way prints last, as JSON, run in separate processes in turn for several rounds."""
    printed: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way in ways:
            process = subprocess.run(
                [sys.executable, script, "--one", way, *options], stdout=subprocess.PIPE, text=True, check=True
            )
            printed[way].append(json.loads(process.stdout.strip().splitlines()[-1]))
    return printed


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return median, lowest and highest value."""
    return {"median": round(statistics.median(values), 3), "low": round(min(values), 3), "high": round(max(values), 3)}
