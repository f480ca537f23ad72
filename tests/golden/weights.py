"""Numbers for the golden tests: weights and inputs as a formula of a name, the same on every platform and release."""

import zlib

import numpy as np


def numbers(name: str, shape: tuple[int, ...], scale: float = 1.0) -> np.ndarray:
    """Pseudo-random float64 numbers in (-scale, scale), a pure function of the name and the shape."""
    index = np.arange(1, int(np.prod(shape)) + 1, dtype=np.float64)
    seed = zlib.crc32(name.encode()) % 9973
    waves = np.sin(index * 12.9898 + seed * 78.233) * 437.585453
    return ((waves - np.floor(waves)) * 2.0 - 1.0).reshape(shape) * scale


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The value of a parameter by its name in this project: norms near 1, matrices of about unit gain, small biases."""
    if "norm" in name and name.endswith("weight"):
        return 1.0 + numbers(name, shape, 0.2)
    if name.endswith("bias"):
        return numbers(name, shape, 0.1)
    if "embedding" in name or "token" in name:
        return numbers(name, shape, 0.5)
    return numbers(name, shape, (3.0 / np.prod(shape[1:])) ** 0.5)


TEXT = dict(
    vocab_size=97, hidden_size=48, num_hidden_layers=3, num_attention_heads=6, intermediate_size=80,
    max_position_embeddings=64, hidden_dropout_prob=0.0,
)  # fmt: skip
VISION = dict(
    hidden_size=48, num_hidden_layers=3, num_attention_heads=3, intermediate_size=72, image_size=32, patch_size=8,
    rope_reference_grid=6, patch_dropout=0.0,
)  # fmt: skip
PROJECTION = 40
LENGTHS = (13, 7, 1)  # tokens of the three texts; the batch is padded to 13
LARGER = 48  # side of the larger images, in pixels


def token_ids() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """input_ids, attention_mask and token_type_ids, each (3, 13)."""
    ids = (np.abs(numbers("token ids", (len(LENGTHS), max(LENGTHS)))) * 96).astype(np.int64) + 1
    types = (numbers("types", ids.shape) > 0).astype(np.int64)
    mask = (np.arange(ids.shape[1])[None, :] < np.array(LENGTHS)[:, None]).astype(np.int64)
    return ids * mask, mask, types * mask


def pixels(side: int) -> np.ndarray:
    return numbers(f"pixels {side}", (2, 3, side, side), 2.0)
