"""Losses that also hold for the first dimensions of the embeddings (arXiv 2205.13147)."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional as F


def matryoshka(
    loss: Callable[..., torch.Tensor], dims: Sequence[int], weights: Sequence[float] | None = None
) -> Callable[..., torch.Tensor]:
    """Return a loss that also holds for the first d dimensions of the embeddings (arXiv 2205.13147).

    Args:
        loss: a function of `bifocal.training.losses`; its floating-point tensors of two or three
            dimensions are embeddings.
        dims: numbers of dimensions; include the full number if it should count. Embeddings are normalised again after
            each cut.
        weights: factor of each loss; 1 if None.

    Returns:
        A function of the same arguments: sum_d weight_d * loss of the first d dimensions.

    Raises:
        ValueError: if there are no dimensions, or not as many weights, or (at the call) the embeddings have fewer.
    """
    weights = [1.0] * len(dims) if weights is None else list(weights)
    if not dims or len(weights) != len(dims) or min(dims) < 1:
        raise ValueError(f"matryoshka needs a positive number of dimensions and a weight each, not {dims}, {weights}.")

    def cut(value: Any, dim: int) -> Any:
        if not isinstance(value, torch.Tensor) or value.dim() < 2 or not value.is_floating_point():
            return value
        if dim > value.shape[-1]:
            raise ValueError(f"Matryoshka dimension {dim} exceeds the {value.shape[-1]} that the embeddings have.")
        return value if dim == value.shape[-1] else F.normalize(value[..., :dim], dim=-1)

    def loss_of_all_dims(*arguments: Any, **options: Any) -> torch.Tensor:
        total = None
        for dim, weight in zip(dims, weights, strict=True):
            part = weight * loss(*[cut(argument, dim) for argument in arguments], **options)
            total = part if total is None else total + part
        assert total is not None
        return total

    return loss_of_all_dims
