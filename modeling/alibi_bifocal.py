# Copyright 2026 The Bifocal authors. Licensed under the Apache License, Version 2.0.
"""Symmetric ALiBi (arXiv 2108.12409; symmetric form arXiv 2310.19923, section 3.1) as an attention bias."""

import copy
import inspect
import math
from collections.abc import Iterator
from typing import Any

import torch
from transformers.integrations.flex_attention import flex_attention_forward

# Largest number of elements of the bias (batch x heads x queries x keys) that is computed once and shared by all layers
# (512 MiB in float32), and of a block of a larger one (128 MiB): 8,192 tokens and 12 heads would need 3 GiB.
_LARGEST_WHOLE = 2**27
_BLOCK = 2**25
FLEX_SUPPORTS_BIAS = "position_bias" in inspect.signature(flex_attention_forward).parameters


def alibi_slopes(num_heads: int) -> list[float]:
    """Return the slope of each head (arXiv 2108.12409, section 3, with its rule for other counts than powers of two).

    For n = 2^m heads the slopes are 2^(-8/n), 2^(-16/n), ... Otherwise the first heads take those of the next smaller
    power of two, and the rest every second one of its double.
    """
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2.0 ** (-8.0 * k / power) for k in range(1, power + 1)]
    between = [2.0 ** (-4.0 * k / power) for k in range(1, 2 * power + 1, 2)]
    return slopes + between[: num_heads - power]


class AlibiBias:
    """The attention bias -slope_h |i - j| of queries i and keys j; the lowest number where key j is padding.

    It is computed once per forward pass and shared by the layers. If it is too large, each layer computes it block by
    block of queries. With gradients it is always computed whole, since autograd would keep every block anyway.

    Args:
        num_heads: number of attention heads.
        hidden_states: (batch, length, width); sets shape, device and dtype.
        padding: (batch, length), True at padding; None without padding.
    """

    def __init__(self, num_heads: int, hidden_states: torch.Tensor, padding: torch.Tensor | None) -> None:
        batch, length, _ = hidden_states.shape
        device = hidden_states.device
        self.batch, self.length = batch, length
        self.dtype = hidden_states.dtype
        if device.type != "meta" and torch.is_autocast_enabled(device.type):
            self.dtype = torch.get_autocast_dtype(device.type)
        self.slopes = torch.tensor(alibi_slopes(num_heads), dtype=torch.float32, device=device).view(1, -1, 1, 1)
        self.positions = torch.arange(length, device=device)
        self.padding = None if padding is None else padding[:, None, None, :]
        self.rows = length
        elements = (1 if padding is None else batch) * num_heads * length * length
        if elements > _LARGEST_WHOLE and not torch.is_grad_enabled():
            self.rows = max(1, _BLOCK * length // elements)
        self.whole = self._compute(0, length) if self.rows >= length else None

    def _compute(self, start: int, stop: int) -> torch.Tensor:
        """Return the bias of queries start to stop: (batch or 1, heads, stop - start, length)."""
        distance = (self.positions[start:stop, None] - self.positions[None, :]).abs()
        bias = (distance * -self.slopes).to(self.dtype)
        if self.padding is not None:
            bias = torch.where(self.padding, torch.finfo(self.dtype).min, bias)
        return bias

    def to(self, device: torch.device | str, **kwargs: Any) -> "AlibiBias":
        """Return the bias on another device; called for the inputs of layers that `device_map` spreads over devices."""
        if self.slopes.device == torch.device(device):
            return self
        moved = copy.copy(self)
        for name in ("slopes", "positions", "padding", "whole"):
            tensor = getattr(self, name)
            setattr(moved, name, None if tensor is None else tensor.to(device, **kwargs))
        return moved

    def blocks(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """Yield the query rows and the bias of each block; there is a single one unless the text is very long."""
        if self.whole is not None:
            yield slice(0, self.length), self.whole
            return
        for start in range(0, self.length, self.rows):
            stop = min(start + self.rows, self.length)
            yield slice(start, stop), self._compute(start, stop)

    def as_arguments(self, block: torch.Tensor, implementation: str | None) -> dict[str, Any]:
        """Return the keyword arguments with which an attention function of transformers gets this bias.

        Raises:
            ValueError: if flex attention of the installed transformers would silently ignore the bias.
        """
        if implementation != "flex_attention":
            return {"attention_mask": block}
        if not FLEX_SUPPORTS_BIAS:
            raise ValueError(
                "flex_attention of the installed transformers does not support a position bias, which ALiBi needs. "
                "Update transformers or load the model with attn_implementation='sdpa'."
            )
        return {"attention_mask": None, "position_bias": block.expand(self.batch, -1, -1, -1)}
