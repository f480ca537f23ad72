"""Batches larger than memory (GradCache, arXiv 2101.06983), for both towers and any number of processes.

Three phases: `embed_chunks` embeds all chunks, the first ones with a graph as far as memory allows
(`graph_memory`); `build_cache` computes the loss and its gradients with respect to the embeddings; `forward_backward`
passes its part of the gradients on to each chunk, which is embedded again if it kept no graph. The result is that of
the direct step. Random states are restored, so that dropout and patch dropout draw the same in both passes.

Chunks that keep their graph come first in all phases: their memory is free again before the first chunk is embedded
again. The order of draws and sums is the same however many there are, and so is the result.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

Inputs = dict[str, torch.Tensor]
Chunk = tuple[list[Inputs], list[Inputs]]
Embeddings = dict[str, torch.Tensor]
Forward = Callable[[list[Inputs], list[Inputs]], Embeddings]

_BY_ROW = ("texts", "images")  # outputs with one row per text or image; the others are scalars


def into_chunks(
    texts: Sequence[Inputs],
    images: Sequence[Inputs],
    text_rows: int | None,
    image_rows: int | None,
    both_last: bool = False,
) -> list[Chunk]:
    """Return chunks for one forward pass each: (texts, images).

    Args:
        text_rows, image_rows: most rows of a chunk; None does not cut.
        both_last: the last chunk holds texts and images if there are both. DDP needs it: it sends the gradients of one
            pass, in which all parameters must take part. Otherwise it only costs memory.
    """
    text_parts = [{k: v[s] for k, v in part.items()} for part in texts for s in _slices(part, text_rows)]
    image_parts = [{k: v[s] for k, v in part.items()} for part in images for s in _slices(part, image_rows)]
    if not (both_last and text_parts and image_parts):
        return [([part], []) for part in text_parts] + [([], [part]) for part in image_parts]
    alone: list[Chunk] = [([part], []) for part in text_parts[:-1]]
    alone += [([], [part]) for part in image_parts[:-1]]
    return [*alone, ([text_parts[-1]], [image_parts[-1]])]


def _slices(part: Inputs, rows: int | None) -> list[slice]:
    count = len(next(iter(part.values())))
    size = rows or count
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def cached_step(
    chunks: Sequence[Chunk],
    forward: Forward,
    loss_of: Callable[[Embeddings], torch.Tensor],
    backward: Callable[[torch.Tensor], Any],
    no_sync: Callable[[], AbstractContextManager],
    num_kept: int = 0,
) -> torch.Tensor:
    """Add the gradients of one step to the parameters.

    Args:
        chunks: from `into_chunks`.
        forward: embeds a chunk: `texts`, `images` and the scalars `scale` and `bias`.
        loss_of: the loss of all embeddings.
        backward: starts a backward pass from a scalar.
        no_sync: a context in which processes keep their gradients to themselves; all passes but the last run in it.
        num_kept: number of first chunks that keep their graph instead of being embedded twice. With several processes
            the last chunk must not: DDP prepares to send gradients in the forward pass of the chunk that sends them,
            and would take the backward passes of other chunks after it for that one.

    Returns:
        The loss, without a graph.
    """
    outputs, random_states = embed_chunks(chunks, forward, no_sync, num_kept)
    loss, cache = build_cache(outputs, loss_of)
    forward_backward(chunks, forward, outputs[:num_kept], cache, random_states, backward, no_sync)
    return loss


def embed_chunks(
    chunks: Sequence[Chunk], forward: Forward, no_sync: Callable[[], AbstractContextManager], num_kept: int
) -> tuple[list[Embeddings], list["RandomState"]]:
    """Return the outputs of each chunk, and the random state before each that kept no graph.

    The first `num_kept` chunks keep theirs.
    """
    outputs, random_states = [], []
    for texts, images in chunks[:num_kept]:
        with no_sync():
            outputs.append(forward(texts, images))
    with torch.no_grad():
        for texts, images in chunks[num_kept:]:
            random_states.append(RandomState())
            outputs.append(forward(texts, images))
    return outputs, random_states


def build_cache(
    outputs: Sequence[Embeddings], loss_of: Callable[[Embeddings], torch.Tensor]
) -> tuple[torch.Tensor, dict[str, torch.Tensor | None]]:
    """Return the loss of all chunks together and its gradients with respect to the embeddings, `scale` and `bias`."""
    leaves = {}
    for name in sorted({name for output in outputs for name in output}):
        values = [output[name] for output in outputs if name in output]
        leaves[name] = (torch.cat(values) if name in _BY_ROW else values[0]).detach().requires_grad_()
    with torch.enable_grad():
        loss = loss_of(leaves)
        loss.backward()
    return loss.detach(), {name: leaf.grad for name, leaf in leaves.items()}


def forward_backward(
    chunks: Sequence[Chunk],
    forward: Forward,
    kept: Sequence[Embeddings],
    cache: dict[str, torch.Tensor | None],
    random_states: Sequence["RandomState"],
    backward: Callable[[torch.Tensor], Any],
    no_sync: Callable[[], AbstractContextManager],
) -> None:
    """Pass its part of the cached gradients on to the graph of each chunk, and by it to the parameters.

    Args:
        kept: outputs of the first chunks, with a graph; the others are embedded again.
        random_states: random states in which these others are embedded.
    """
    starts = dict.fromkeys(_BY_ROW, 0)
    for number, (texts, images) in enumerate(chunks):
        is_last = number == len(chunks) - 1
        with nullcontext() if is_last else no_sync():
            if number < len(kept):
                outputs = kept[number]
            else:
                random_states[number - len(kept)].restore()
                outputs = forward(texts, images)
            # A scalar whose gradient with respect to the embeddings is the cached one.
            surrogate = next(iter(outputs.values())).new_zeros(())
            for name, value in outputs.items():
                gradient = cache[name]
                if name in _BY_ROW:
                    start, starts[name] = starts[name], starts[name] + len(value)
                    if gradient is not None:
                        surrogate = surrogate + (value * gradient[start : starts[name]]).sum()
                elif is_last and gradient is not None:  # temperature and bias, once
                    surrogate = surrogate + value * gradient
            backward(surrogate)


class RandomState:
    """The state of the random generators of the CPU and of the accelerator in use.

    `torch.random.fork_rng` only brings back the state in which it was entered; a chunk needs that of an earlier pass.
    """

    def __init__(self) -> None:
        self.cpu = torch.get_rng_state()
        self.accelerator: torch.Tensor | None = None
        if torch.accelerator.is_available():
            self.accelerator = _accelerator_module().get_rng_state()

    def restore(self) -> None:
        """Make the following random draws those that followed this state."""
        torch.set_rng_state(self.cpu)
        if self.accelerator is not None:
            _accelerator_module().set_rng_state(self.accelerator)


def _accelerator_module() -> Any:
    return torch.get_device_module(torch.accelerator.current_accelerator())
