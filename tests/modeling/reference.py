"""Both towers once more, slowly: loops over rows, heads and tokens, in float64, straight from the equations.

Shares no code with `bifocal.modeling`; weights come by their names in its state dict.
"""

import math

import numpy as np

Weights = dict[str, np.ndarray]


def linear(x: np.ndarray, weights: Weights, name: str) -> np.ndarray:
    y = x @ weights[f"{name}.weight"].T
    return y + weights[f"{name}.bias"] if f"{name}.bias" in weights else y


def layer_norm(x: np.ndarray, weights: Weights, name: str, eps: float) -> np.ndarray:
    mean = x.mean(axis=-1, keepdims=True)
    variance = ((x - mean) ** 2).mean(axis=-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + eps) * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def softmax(scores: list[float]) -> list[float]:
    top = max(scores)
    powers = [math.exp(score - top) for score in scores]
    return [power / sum(powers) for power in powers]


def slope(head: int, heads: int) -> float:
    """Slope of a head, counted from 0 (arXiv 2108.12409, section 3 and the authors' rule for other head counts)."""
    power = 1
    while power * 2 <= heads:
        power *= 2
    if head < power:
        return 2.0 ** (-8.0 / power * (head + 1))
    return 2.0 ** (-8.0 / (2 * power) * (2 * (head - power) + 1))


def attend(query: np.ndarray, key: np.ndarray, value: np.ndarray, bias) -> np.ndarray:
    """One head: (tokens, d) each; `bias(i, j)` is added to the scaled score."""
    tokens, width = query.shape
    output = np.zeros_like(value)
    for i in range(tokens):
        scores = [float(query[i] @ key[j]) / math.sqrt(width) + bias(i, j) for j in range(tokens)]
        for weight, row in zip(softmax(scores), value, strict=True):
            output[i] += weight * row
    return output


def text_tower(weights: Weights, config, ids: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """States (tokens, width) and the pooled vector of one text without padding."""
    heads, eps = config.num_attention_heads, config.layer_norm_eps
    words, types = (weights[f"embeddings.{kind}_embeddings.weight"] for kind in ("word", "token_type"))
    x = layer_norm(np.stack([words[token] + types[0] for token in ids]), weights, "embeddings.norm", eps)
    width = x.shape[1] // heads
    for number in range(config.num_hidden_layers):
        layer = f"layers.{number}"
        q, k, v = (linear(x, weights, f"{layer}.attention.{name}_proj") for name in "qkv")
        mixed = np.zeros_like(x)
        for head in range(heads):
            part = slice(head * width, (head + 1) * width)

            def alibi(i: int, j: int, head: int = head) -> float:
                return -slope(head, heads) * abs(i - j)

            mixed[:, part] = attend(q[:, part], k[:, part], v[:, part], alibi)
        mixed = linear(mixed, weights, f"{layer}.attention.out_proj")
        x = layer_norm(x + mixed, weights, f"{layer}.attention_norm", eps)
        inner = linear(x, weights, f"{layer}.mlp.gate_up_proj")
        gate, up = inner[:, : config.intermediate_size], inner[:, config.intermediate_size :]
        gelu = np.vectorize(lambda value: 0.5 * value * (1.0 + math.erf(value / math.sqrt(2.0))))
        x = layer_norm(
            x + linear(gelu(gate) * up, weights, f"{layer}.mlp.down_proj"), weights, f"{layer}.mlp_norm", eps
        )
    return x, x.mean(axis=0)


def turn(x: np.ndarray, row: float, column: float, theta: float) -> np.ndarray:
    """The 2D rotary embedding of one head's channels: pairs in the first half by the row, in the second the column."""
    turned = x.copy()
    half = len(x) // 2
    for offset, position in ((0, row), (half, column)):
        for pair in range(half // 2):
            angle = position * theta ** (-2.0 * pair / half)
            a, b = x[offset + 2 * pair], x[offset + 2 * pair + 1]
            turned[offset + 2 * pair] = a * math.cos(angle) - b * math.sin(angle)
            turned[offset + 2 * pair + 1] = b * math.cos(angle) + a * math.sin(angle)
    return turned


def image_tower(weights: Weights, config, pixels: np.ndarray) -> np.ndarray:
    """States (1 + patches, width) after the final norm of one image (channels, side, side) of the trained size."""
    size, heads, eps = config.patch_size, config.num_attention_heads, config.layer_norm_eps
    grid = config.image_size // size
    kernel, bias = (weights[f"embeddings.patch_embedding.{kind}"] for kind in ("weight", "bias"))
    tokens = [weights["embeddings.class_token"][0, 0]]
    for row in range(grid):
        for column in range(grid):
            patch = pixels[:, row * size : (row + 1) * size, column * size : (column + 1) * size]
            tokens.append((kernel * patch).sum(axis=(1, 2, 3)) + bias)
    x = np.stack(tokens) + weights["embeddings.position_embedding"][0]
    width = x.shape[1] // heads
    scale = 1.0 if config.rope_reference_grid is None else config.rope_reference_grid / grid
    for number in range(config.num_hidden_layers):
        layer = f"layers.{number}"
        normed = layer_norm(x, weights, f"{layer}.attention_norm", eps)
        q, k, v = (linear(normed, weights, f"{layer}.attention.{name}_proj") for name in "qkv")
        mixed = np.zeros_like(x)
        for head in range(heads):
            part = slice(head * width, (head + 1) * width)
            q_head, k_head = q[:, part].copy(), k[:, part].copy()
            for patch in range(grid * grid):
                place = (patch // grid * scale, patch % grid * scale)
                q_head[1 + patch] = turn(q_head[1 + patch], *place, config.rope_theta)
                k_head[1 + patch] = turn(k_head[1 + patch], *place, config.rope_theta)
            mixed[:, part] = attend(q_head, k_head, v[:, part], lambda i, j: 0.0)
        mixed = layer_norm(mixed, weights, f"{layer}.attention.inner_norm", eps)
        x = x + linear(mixed, weights, f"{layer}.attention.out_proj")
        normed = layer_norm(x, weights, f"{layer}.mlp_norm", eps)
        gate, up = (linear(normed, weights, f"{layer}.mlp.{name}_proj") for name in ("gate", "up"))
        inner = layer_norm(gate / (1.0 + np.exp(-gate)) * up, weights, f"{layer}.mlp.inner_norm", eps)
        x = x + linear(inner, weights, f"{layer}.mlp.down_proj")
    return layer_norm(x, weights, "norm", eps)
