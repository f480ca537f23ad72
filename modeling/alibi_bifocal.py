# Copyright 2026 The Bifocal authors. Licensed under the Apache License, Version 2.0.
"""Symmetric ALiBi (arXiv 2108.12409; symmetric form arXiv 2310.19923, section 3.1) as an attention bias."""

import copy
import math
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

# Largest number of elements of the bias (batch x heads x queries x keys) that is computed once and shared by all layers
# (512 MiB in float32), and of a block of a larger one (128 MiB): 8,192 tokens and 12 heads would need 3 GiB.
_LARGEST_WHOLE = 2**27
_BLOCK = 2**25
# With gradients and fused attention, the bias of texts up to this length is small beside what each layer keeps (for
# heads of 64, about 26 x batch x length x width elements): recomputing it in blocks would cost time and save little.
_LONG = 1024


def alibi_slopes(num_heads: int) -> list[float]:
    """Return the slope of each head (arXiv 2108.12409, section 3, with its rule for other counts than powers of two).

    For n = 2^m heads the slopes are 2^(-8/n), 2^(-16/n), ... Otherwise the first heads take those of the next smaller
    power of two, and the rest every second one of its double.
    """
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2.0 ** (-8.0 * k / power) for k in range(1, power + 1)]
    between = [2.0 ** (-4.0 * k / power) for k in range(1, 2 * power + 1, 2)]
    return slopes + between[: num_heads - power]


def key_spans(padding: torch.Tensor) -> list[tuple[int, int]] | None:
    """Return the first key of each row that is not padding and the end of those keys; (0, 0) for a row of padding only.

    None if padding stands between the tokens of any row.

    Args:
        padding: (batch, length), True at padding.
    """
    numbers = torch.arange(1, padding.shape[1] + 1, device=padding.device)
    tokens = ~padding
    stops = (tokens * numbers).amax(1)
    starts = torch.where(stops > 0, tokens.int().argmax(1), 0)
    if not torch.equal(stops - starts, tokens.sum(1)):
        return None
    return list(zip(starts.tolist(), stops.tolist(), strict=True))


def padding_block_mask(padding: torch.Tensor) -> BlockMask:
    """Return flex attention's mask of the keys that are padding; a row of padding only keeps all its keys.

    Args:
        padding: (batch, length), True at padding.
    """
    batch, length = padding.shape
    kept = ~padding | padding.all(1, keepdim=True)  # without any key, the row's output would be undefined

    def mask_mod(row: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return kept[row, key]

    create: Any = create_block_mask
    if padding.device.type != "cpu" and not torch.compiler.is_compiling():
        create = torch.compile(create_block_mask)  # otherwise it holds batch x length x length elements
    return create(mask_mod, batch, None, length, length, device=padding.device)


class AlibiBias:
    """The attention bias -slope_h |i - j| of queries i and keys j; the lowest number where key j is padding.

    A bias of moderate size is computed whole, once per forward pass, and shared by the layers (`whole`). A larger one
    is never held: the fused attention of a CPU reads it from a short vector (`toeplitz`) and gets each row's `spans`
    instead of padding; others get it in blocks of queries (`rows`, `block`). Flex attention computes it from `slopes`
    and gets padding as `block_mask`.

    Args:
        num_heads: number of attention heads.
        hidden_states: (batch, length, width); sets shape, device and dtype.
        padding: (batch, length), True at padding; None without padding.
        implementation: attention implementation that the layers run.
    """

    def __init__(
        self, num_heads: int, hidden_states: torch.Tensor, padding: torch.Tensor | None, implementation: str | None
    ) -> None:
        batch, length, _ = hidden_states.shape
        device = hidden_states.device
        self.length = length
        self.dtype = hidden_states.dtype
        if device.type != "meta" and torch.is_autocast_enabled(device.type):
            self.dtype = torch.get_autocast_dtype(device.type)
        self.slopes = torch.tensor(alibi_slopes(num_heads), dtype=torch.float32, device=device).view(1, -1, 1, 1)
        self.positions = torch.arange(length, device=device)
        self.padding = padding
        self.rows = length
        self.spans: list[tuple[int, int]] | None = None
        self.block_mask: BlockMask | None = None
        self.whole: torch.Tensor | None = None
        if implementation == "flex_attention":
            self.block_mask = None if padding is None else padding_block_mask(padding)
            return
        elements = (1 if padding is None else batch) * num_heads * length * length
        large, fused = elements > _LARGEST_WHOLE, implementation == "sdpa"
        traced = torch.compiler.is_compiling() or torch.jit.is_tracing()  # the spans may be unknown there
        if large and fused and device.type == "cpu" and not traced:
            self.spans = [(0, length)] * batch if padding is None else key_spans(padding)
        cheap = fused and torch.is_grad_enabled() and length <= _LONG
        if self.spans is not None or (large and not cheap):
            self.rows = max(1, _BLOCK * length // elements)
        else:
            self.whole = self.block(0, length)

    def block(self, start: int, stop: int) -> torch.Tensor:
        """Return the bias of queries start to stop: (batch or 1, heads, stop - start, length)."""
        distance = (self.positions[start:stop, None] - self.positions[None, :]).abs()
        bias = (distance * -self.slopes).to(self.dtype)
        if self.padding is not None:
            bias = torch.where(self.padding[:, None, None, :], torch.finfo(self.dtype).min, bias)
        return bias

    def toeplitz(self) -> torch.Tensor:
        """Return the bias without padding, (1, heads, queries, keys in reverse order), as a view of a short vector.

        Query i and key j are i - j apart, so with reversed keys the bias depends on the sum of both indices: each row
        is the window of the vector (heads, 2 x length - 1) that starts one further than the row before.
        """
        distance = torch.arange(1 - self.length, self.length, device=self.slopes.device).abs()
        return (distance * -self.slopes[:, :, 0]).to(self.dtype).unfold(-1, self.length, 1)

    def to(self, device: torch.device | str, **kwargs: Any) -> "AlibiBias":
        """Return the bias on another device; called for the inputs of layers that `device_map` spreads over devices."""
        if self.slopes.device == torch.device(device):
            return self
        moved = copy.copy(self)
        for name in ("slopes", "positions", "padding", "whole"):
            tensor = getattr(self, name)
            setattr(moved, name, None if tensor is None else tensor.to(device, **kwargs))
        if moved.block_mask is not None:  # its function reads the padding
            assert moved.padding is not None
            moved.block_mask = padding_block_mask(moved.padding)
        return moved
