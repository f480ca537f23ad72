# Copyright 2026 The Bifocal authors. Licensed under the Apache License, Version 2.0.
"""Inference on a CPU: batches that fit its caches, and texts one after another in a row, without padding."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from .alibi_bifocal import AlibiBias

# Tokens per micro-batch on a CPU without gradients. Larger ones are slower: their activations do not fit into the
# caches, and each layer fills new pages of memory. For widths of 384 and 768, 1,024 took a third to a half of the time
# of 32 texts of up to 512 tokens at once; 512 and 2,048 took about as long as 1,024.
CPU_TOKENS = 1024


def micro_batches(lengths: Sequence[int], limit: int = CPU_TOKENS) -> list[list[int]]:
    """Return rows of these lengths in groups, longest first, each of at most `limit` tokens once it is padded."""
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    batches, start = [], 0
    while start < len(order):
        stop = start + max(1, limit // max(1, lengths[order[start]]))
        batches.append(order[start:stop])
        start = stop
    return batches


def packs(lengths: Sequence[int], limit: int = CPU_TOKENS) -> list[list[int]]:
    """Return texts of these lengths in groups, longest first, each of at most `limit` tokens or a single text."""
    groups: list[list[int]] = []
    tokens = limit
    for text in sorted(range(len(lengths)), key=lambda text: -lengths[text]):
        tokens += lengths[text]
        if tokens > limit:
            groups.append([])
            tokens = lengths[text]
        groups[-1].append(text)
    return groups


class PackedAlibi:
    """The ALiBi biases of texts in one row, where each text attends to itself only.

    Args:
        lengths: tokens of each text; texts of the same length should be neighbours, since they share a call.
        bias: bias of the longest text, without padding. That of a shorter text is its corner.
    """

    def __init__(self, lengths: Sequence[int], bias: AlibiBias) -> None:
        whole = bias.block(0, bias.length) if bias.whole is None else bias.whole
        self.groups: list[tuple[slice, int, torch.Tensor]] = []
        start = 0
        for length, texts in itertools.groupby(lengths):
            count = len(list(texts))
            self.groups.append((slice(start, start + count * length), count, whole[..., :length, :length]))
            start += count * length

    def attend(
        self,
        function: Callable,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Return the output (1, tokens, heads, head width) of an attention function of transformers' interface.

        Args:
            query, key, value: (1, heads, tokens, head width).
        """
        outputs = []
        for tokens, count, mask in self.groups:
            q, k, v = (x[0, :, tokens].unflatten(1, (count, -1)).transpose(0, 1) for x in (query, key, value))
            outputs.append(function(module, q, k, v, attention_mask=mask, **kwargs)[0].flatten(0, 1))
        return (outputs[0] if len(outputs) == 1 else torch.cat(outputs)).unsqueeze(0)
