"""`auto_find_chunk_size`: how many texts and images fit into memory in one forward pass."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from PIL import Image
from torch import nn

from bifocal.modeling import BifocalProcessor
from bifocal.modeling.towers_bifocal import padded_length
from bifocal.training.engine.activation_memory import SHARE, free_memory, kept_for_backward
from bifocal.training.tasks import Task


def find_chunk_sizes(
    model: nn.Module, tasks: Iterable[Task], max_length: int, processor: BifocalProcessor, args: Any
) -> tuple[int, int]:
    """Return the largest powers of two whose activations, measured on this model, fit into the free memory.

    What autograd keeps for the backward pass is measured at one and two rows of the longest text and the largest image;
    it grows with the rows. Nothing is risked: no attempt runs out of memory.

    Returns:
        Texts and images, each at most the largest batch of its modality.
    """
    largest = {"text": 1, "image": 1}
    for task in tasks:
        texts_of_row = {"image-text": 1, "text-pair": 2, "text-triplet": 2 + (task.num_negatives or 0)}[task.kind]
        largest["text"] = max(largest["text"], texts_of_row * task.batch_size)
        if task.modality == "image":
            largest["image"] = max(largest["image"], task.batch_size)
    device = next(model.parameters()).device
    free = free_memory(device) - 3 * sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    per_row = dict(zip(largest, kept_per_row(model, max_length, processor, args), strict=True))
    sizes = {}
    for modality, most in largest.items():
        affordable = max(1, int(SHARE * free / 2 / max(1, per_row[modality])))
        # A power of two, or the whole batch.
        sizes[modality] = most if affordable >= most else 2 ** (affordable.bit_length() - 1)
    return sizes["text"], sizes["image"]


def kept_per_row(model: nn.Module, max_length: int, processor: BifocalProcessor, args: Any) -> tuple[int, int]:
    """Return the bytes that autograd keeps for a text of `max_length` tokens and an image of the processor's size."""
    pad_to = padded_length(model.config)
    device = next(model.parameters()).device
    model.train()

    def text(rows: int) -> int:
        ids = torch.ones(rows, pad_to or max_length, dtype=torch.long, device=device)
        padding = torch.ones_like(ids)
        padding[0, 1:] = 0  # attention may need no mask, and so less, where nothing is padded
        mask = {} if pad_to else {"attention_mask": padding}
        return kept_for_backward(model, [{"input_ids": ids, **mask}], [], args)

    def image(rows: int) -> int:
        blank = processor.image_processor([Image.new("RGB", (64, 64))] * rows, return_tensors="pt")
        return kept_for_backward(model, [], [{name: value.to(device) for name, value in blank.items()}], args)

    def per_row(kept: Callable[[int], int]) -> int:
        # Where a row more makes attention compute its bias in another way, a difference may be far too small.
        one, two, three = (kept(rows) for rows in (1, 2, 3))
        return max(two - one, three - two)

    return per_row(text), per_row(image)
