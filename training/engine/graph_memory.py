"""`graph_memory`: how many chunks keep their graph between the two passes of the gradient cache."""

import math
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from bifocal.training.engine.activation_memory import SHARE, free_memory, kept_for_backward, trim_heap
from bifocal.training.engine.gradient_cache import Chunk, Inputs

logger = logging.get_logger(__name__)

_LONGER = 1.25  # rows up to this much longer stand in for a length that was not measured
GIB = 2**30


class GraphMemory:
    """Counts the chunks whose graphs fit into memory together, before any of them is embedded.

    What autograd keeps for the rows of a chunk is measured once for each length, at two and three rows: it consists of
    a part that grows with the rows, and of a fixed one (such as weights that autocast converts).

    Args:
        model: model that is trained, not wrapped in anything.
        args: `BifocalTrainingArguments`.
    """

    def __init__(self, model: nn.Module, args: Any) -> None:
        self.model = model
        self.args = args
        self.measured: dict[str, dict[int, tuple[float, float]]] = {"text": {}, "image": {}}
        self.is_logged = False

    def num_kept(self, chunks: Sequence[Chunk], optimizer: Any = None) -> int:
        """Return how many of the first chunks can keep their graph.

        Args:
            chunks: from `into_chunks`.
            optimizer: optimiser whose states and gradients are subtracted from what is free, as far as they do not
                exist yet.
        """
        if self.args.graph_memory == 0.0:
            return 0
        needed = list(
            accumulate(
                sum(self.kept_bytes("text", part) for part in texts)
                + sum(self.kept_bytes("image", part) for part in images)
                for texts, images in chunks
            )
        )
        limit = self.limit(optimizer)
        on_cpu = next(self.model.parameters()).device.type == "cpu"
        if self.args.graph_memory == "auto" and on_cpu and needed[-1] > limit:
            trim_heap()  # the activations of earlier steps would count as used
            limit = self.limit(optimizer)
        count = bisect_right(needed, limit)
        if not self.is_logged:
            self.is_logged = True
            logger.info(
                f"The gradient cache keeps the graphs of {count} of {len(chunks)} chunks; all need "
                f"{needed[-1] / GIB:.2f} GiB, and {max(0.0, limit) / GIB:.2f} GiB are allowed (graph_memory)."
            )
        return count

    def limit(self, optimizer: Any = None) -> float:
        """Return the bytes that graphs may keep now."""
        if self.args.graph_memory != "auto":
            return float(self.args.graph_memory) * GIB
        trained = [p for p in self.model.parameters() if p.requires_grad]
        pending = sum(p.numel() * p.element_size() for p in trained if p.grad is None)
        if optimizer is not None and not optimizer.state:
            pending += 2 * sum(p.numel() * p.element_size() for p in trained)
        return SHARE * (free_memory(next(self.model.parameters()).device) - pending)

    def kept_bytes(self, modality: str, part: Inputs) -> float:
        """Return at least the bytes that autograd keeps for the rows of one input of a tower."""
        values = next(iter(part.values()))
        rows, length = len(values), math.prod(values.shape[1:])
        known = self.measured[modality]
        # What is kept for a row grows at least as fast as its length, so a longer row's bytes scale down.
        reference = min((longer for longer in known if length <= longer <= _LONGER * length), default=None)
        if reference is None:
            reference, known[length] = length, self._measure(modality, part)
        fixed, per_row = known[reference]
        return fixed + rows * per_row * length / reference

    def _measure(self, modality: str, part: Inputs) -> tuple[float, float]:
        """Return the bytes that do not depend on the number of rows, and those of each row."""
        values = next(iter(part.values()))
        numbers = torch.arange(3, device=values.device) % len(values)
        three = {name: value[numbers] for name, value in part.items()}
        if "attention_mask" in three and three["attention_mask"].shape[-1] > 1:
            three["attention_mask"][0, -1] = 0  # attention may need no mask, and so less, where nothing is padded

        def kept(rows: int) -> int:
            inputs = [{name: value[:rows] for name, value in three.items()}]
            return kept_for_backward(self.model, *((inputs, []) if modality == "text" else ([], inputs)), self.args)

        # Where a row more makes attention compute its bias in another way, a difference may be far too small.
        one, two, three_rows = kept(1), kept(2), kept(3)
        per_row = max(two - one, three_rows - two)
        return max(0, two - 2 * per_row, one - per_row), per_row
