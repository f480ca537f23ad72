# Copyright 2026 The Bifocal authors. Licensed under the Apache License, Version 2.0.
"""Attention with ALiBi: whole, or for long texts without ever holding the bias of all queries and keys."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.integrations.flex_attention import compile_friendly_flex_attention

from .alibi_bifocal import AlibiBias, padding_block_mask
from .packing_bifocal import PackedAlibi

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], Any]  # query, key, value, mask
_FLEX_MIN_WIDTH = 16  # the narrowest matrices that GPU kernels multiply


def alibi_attention(
    function: Callable,
    implementation: str,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: AlibiBias | PackedAlibi,
    scaling: float,
    dropout: float,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return softmax(q k^T * scaling + bias) v and, if the implementation returns them, the attention weights.

    Args:
        function: attention function of transformers' interface.
        implementation: its name; the function of "flex_attention" is not used, since it takes a bias only.
        module: attention module, for its training mode.
        query, key, value: (batch, heads, length, head width).
        bias: ALiBi and padding.
        scaling: factor on the scores.
        dropout: probability to drop a weight.
        kwargs: other arguments of the attention function.

    Returns:
        The output (batch, queries, heads, head width) and the weights (batch, heads, queries, keys) or None.

    Raises:
        ValueError: if flex attention should drop attention weights.
    """
    if isinstance(bias, PackedAlibi):
        return bias.attend(function, module, query, key, value, scaling=scaling, dropout=dropout, **kwargs), None
    if implementation == "flex_attention":
        return _flex_attention(query, key, value, bias, scaling, dropout, module.training, kwargs), None

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor) -> Any:
        return function(module, query, key, value, attention_mask=mask, scaling=scaling, dropout=dropout, **kwargs)

    if bias.spans is not None and dropout == 0 and implementation == "sdpa" and query.device.type == "cpu":
        return _attention_by_spans(attend, query, key, value, bias, bias.spans), None
    if bias.rows >= bias.length:
        return attend(query, key, value, bias.block(0, bias.length) if bias.whole is None else bias.whole)
    with_weights = bool(kwargs.get("output_attentions"))  # those of all blocks are too large to return them unasked
    return _attention_by_blocks(attend, query, key, value, bias, dropout > 0, with_weights)


def _attention_by_spans(
    attend: Attend, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: AlibiBias,
    spans: Sequence[tuple[int, int]],
) -> torch.Tensor:  # fmt: skip
    """Return the output of fused attention on a CPU, where each row attends to its own keys only.

    Neighbouring rows with the same keys are computed together. A CPU kernel reads the view of `AlibiBias.toeplitz` as
    it is; those of GPUs ask for aligned rows.
    """
    length = bias.length
    groups = [(span, len(list(rows))) for span, rows in itertools.groupby(spans)]
    sizes = [rows for _, rows in groups]
    toeplitz = bias.toeplitz()
    lowest = toeplitz.new_full((), torch.finfo(toeplitz.dtype).min).expand(1, 1, length, length)
    outputs = []
    for ((start, stop), _), q, k, v in zip(
        groups, query.split(sizes), key.flip(2).split(sizes), value.flip(2).split(sizes), strict=True
    ):
        keys = slice(length - stop, length - start) if stop else slice(None)
        mask = toeplitz[..., keys] if stop else lowest
        outputs.append(attend(q, k[:, :, keys], v[:, :, keys], mask)[0])
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _attention_by_blocks(
    attend: Attend, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: AlibiBias, draws: bool,
    with_weights: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """Return output and weights, computed block by block of queries; with gradients, backward computes it again.

    Otherwise autograd would keep every block of the bias, and without a fused kernel all attention weights.

    Args:
        draws: whether attention draws random numbers, which backward must draw again.
        with_weights: whether to return the weights.
    """

    def attend_block(
        start: int, block: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        output, weights = attend(block, key, value, bias.block(start, start + block.shape[2]))
        return output, weights if with_weights else None

    outputs, weights = [], []
    starts = range(0, bias.length, bias.rows)
    for start, block in zip(starts, query.split(bias.rows, dim=2), strict=True):
        if torch.is_grad_enabled():
            output, weight = checkpoint(
                attend_block, start, block, key, value, use_reentrant=False, preserve_rng_state=draws
            )
        else:
            output, weight = attend_block(start, block, key, value)
        outputs.append(output)
        weights.append(weight)
    return torch.cat(outputs, dim=1), None if weights[0] is None else torch.cat(weights, dim=2)


def _flex_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: AlibiBias,
    scaling: float,
    dropout: float,
    training: bool,
    kwargs: dict[str, Any],
) -> torch.Tensor:
    """Return the output of flex attention, which computes the bias within its kernel and skips blocks of padding.

    Outside torch.compile, transformers' wrapper compiles it once for the process.
    """
    if dropout > 0:
        raise ValueError(
            "flex_attention cannot drop attention weights. "
            "Set attention_probs_dropout_prob to 0 or load the model with attn_implementation='sdpa'."
        )
    slopes = bias.slopes.flatten()

    def score_mod(
        score: torch.Tensor, row: torch.Tensor, head: torch.Tensor, i: torch.Tensor, j: torch.Tensor
    ) -> torch.Tensor:
        return score - slopes[head] * (i - j).abs()

    block_mask = bias.block_mask
    if block_mask is None and bias.padding is not None:  # made on another device, for another implementation
        block_mask = padding_block_mask(bias.padding)
    width = query.shape[-1]
    if width < _FLEX_MIN_WIDTH:
        query, key, value = (nn.functional.pad(x, (0, _FLEX_MIN_WIDTH - width)) for x in (query, key, value))
    output = compile_friendly_flex_attention(
        query, key, value, training=training, score_mod=score_mod, block_mask=block_mask, scale=scaling,
        kernel_options=kwargs.get("kernel_options"),
    )  # fmt: skip
    assert isinstance(output, torch.Tensor)
    return output[..., :width].transpose(1, 2).contiguous()
