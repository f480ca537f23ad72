"""Batches larger than memory (GradCache, arXiv 2101.06983), for both towers and any number of processes.

Embed all chunks without a graph; take the loss and its gradients with respect to the embeddings; embed each chunk once
more with a graph and pass its part of those gradients on. The result is that of the direct step, with one chunk's
activations in memory. Random states are kept and set again, so that dropout and patch dropout draw the same twice.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch.utils.checkpoint import get_device_states, set_device_states

Inputs = dict[str, torch.Tensor]
Chunk = tuple[list[Inputs], list[Inputs]]


def into_chunks(
    texts: Sequence[Inputs],
    images: Sequence[Inputs],
    text_rows: int | None,
    image_rows: int | None,
    both_last: bool = False,
) -> list[Chunk]:
    """Parts of at most so many rows, each for one forward pass: (texts, images).

    Args:
        both_last: the last part holds texts and images if there are both. DDP needs that, which sends the gradients of
            one pass in which all parameters take part; elsewhere it only costs memory.
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
    forward: Callable[[list[Inputs], list[Inputs]], dict[str, torch.Tensor]],
    objective: Callable[[dict[str, torch.Tensor]], torch.Tensor],
    backward: Callable[[torch.Tensor], Any],
    no_sync: Callable[[], AbstractContextManager],
) -> torch.Tensor:
    """Add the gradients of one step to the parameters.

    Args:
        chunks: from `into_chunks`.
        forward: embeds a chunk: `texts`, `images` and the scalars `scale` and `bias`.
        objective: the loss of all embeddings.
        backward: starts a backward pass from a scalar.
        no_sync: a context in which processes keep their gradients to themselves; all but the last pass run in it.

    Returns:
        The loss, without a graph.
    """
    states, parts = [], []
    with torch.no_grad():
        for texts, images in chunks:
            states.append(_RandomState())
            parts.append(forward(texts, images))
    names = {name for part in parts for name in part}
    leaves = {
        name: (
            torch.cat([part[name] for part in parts if name in part]) if name in ("texts", "images") else parts[0][name]
        )
        .detach()
        .requires_grad_()
        for name in sorted(names)
    }
    with torch.enable_grad():
        loss = objective(leaves)
        loss.backward()
    used = {"texts": 0, "images": 0}
    for number, ((texts, images), state) in enumerate(zip(chunks, states, strict=True)):
        last = number == len(chunks) - 1
        with _nothing() if last else no_sync(), state.again():
            again = forward(texts, images)
            # Its gradient with respect to the embeddings is the cached one.
            surrogate = torch.zeros((), device=loss.device)
            for name, value in again.items():
                gradient = leaves[name].grad
                if name in used:
                    start = used[name]
                    used[name] = start + len(value)
                    if gradient is not None:
                        surrogate = surrogate + (value * gradient[start : used[name]]).sum()
                elif last and gradient is not None:  # temperature and bias, once
                    surrogate = surrogate + value * gradient
            backward(surrogate)
    return loss.detach()


@contextmanager
def _nothing() -> Iterator[None]:
    yield


class _RandomState:
    """The random generators as they are now, of the CPU and of the accelerator in use."""

    def __init__(self) -> None:
        self.cpu = torch.get_rng_state()
        self.devices: tuple[list[int], list[torch.Tensor]] = ([], [])
        if torch.cuda.is_available():
            self.devices = get_device_states(torch.empty(0, device="cuda"))

    @contextmanager
    def again(self) -> Iterator[None]:
        """Draw within as was drawn after this state was taken."""
        torch.set_rng_state(self.cpu)
        set_device_states(*self.devices)
        yield
