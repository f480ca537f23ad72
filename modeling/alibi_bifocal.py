# Copyright 2026 The Bifocal authors. Licensed under the Apache License, Version 2.0.
"""Symmetric ALiBi (arXiv 2108.12409; symmetric form arXiv 2310.19923, section 3.1) as an attention bias."""

import copy
import inspect
import math
from collections.abc import Iterator
from typing import Any

import torch
from transformers.integrations.flex_attention import flex_attention_forward

# Elements of the bias (batch x heads x queries x keys) up to which it is made once and shared by all layers (512 MiB in
# float32), and the size of one block beyond that (128 MiB in float32): 8,192 tokens and 12 heads would need 3 GiB.
_LARGEST_WHOLE = 2**27
_BLOCK = 2**25
FLEX_TAKES_A_BIAS = "position_bias" in inspect.signature(flex_attention_forward).parameters


def alibi_slopes(num_heads: int) -> list[float]:
    """The slope of each head (arXiv 2108.12409, section 3, and its rule for head counts that are no power of two).

    For n = 2^m heads the slopes are 2^(-8/n), 2^(-16/n), ... Otherwise the first heads take those of the next smaller
    power of two, and the rest every second one of its double.
    """
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2.0 ** (-8.0 * k / power) for k in range(1, power + 1)]
    between = [2.0 ** (-4.0 * k / power) for k in range(1, 2 * power + 1, 2)]
    return slopes + between[: num_heads - power]


class AlibiBias:
    """-slope_h |i - j| for queries i and keys j, and the lowest number where key j is padding.

    Made once per forward and shared by the layers. A bias too large to hold is made block by block of queries in each
    layer instead; while gradients are recorded it is always made whole, since autograd would keep every block anyway.

    Args:
        num_heads: number of attention heads.
        hidden_states: (batch, length, width), for shape, device and dtype.
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
        self.whole = self._make(0, length) if self.rows >= length else None

    def _make(self, start: int, stop: int) -> torch.Tensor:
        """The bias of queries start to stop: (batch or 1, heads, stop - start, length)."""
        distance = (self.positions[start:stop, None] - self.positions[None, :]).abs()
        bias = (distance * -self.slopes).to(self.dtype)
        if self.padding is not None:
            bias = torch.where(self.padding, torch.finfo(self.dtype).min, bias)
        return bias

    def to(self, device: torch.device | str, **kwargs: Any) -> "AlibiBias":
        """On another device: a model spread by `device_map` moves what its layers are given through this method."""
        if self.slopes.device == torch.device(device):
            return self
        moved = copy.copy(self)
        for name in ("slopes", "positions", "padding", "whole"):
            tensor = getattr(self, name)
            setattr(moved, name, None if tensor is None else tensor.to(device, **kwargs))
        return moved

    def blocks(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """The query rows of each block and its bias; one block holds all rows unless the text is very long."""
        if self.whole is not None:
            yield slice(0, self.length), self.whole
            return
        for start in range(0, self.length, self.rows):
            stop = min(start + self.rows, self.length)
            yield slice(start, stop), self._make(start, stop)

    def as_arguments(self, block: torch.Tensor, implementation: str | None) -> dict[str, Any]:
        """The keyword arguments by which an attention function of transformers takes this bias.

        Raises:
            ValueError: flex attention of a transformers release that would silently ignore the bias.
        """
        if implementation != "flex_attention":
            return {"attention_mask": block}
        if not FLEX_TAKES_A_BIAS:
            raise ValueError(
                "flex_attention of the installed transformers takes no position bias, which ALiBi needs; "
                "update transformers or load the model with attn_implementation='sdpa'."
            )
        return {"attention_mask": None, "position_bias": block.expand(self.batch, -1, -1, -1)}
