"""Gathering embeddings of all processes so that every process sees every candidate, gradients included."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from bifocal.errors import BifocalError


class _GatherRows(torch.autograd.Function):
    """All processes' rows; backward, each process gets the sum of what all processes want of its rows.

    torch.distributed.nn has such a function, but its backward pass needs collectives that gloo (CPU) lacks.
    """

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor) -> torch.Tensor:
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


@dataclass(frozen=True)
class World:
    """The processes that train together.

    A loss that each process takes the mean of over its own rows, with gradients averaged over the processes (as DDP
    and FSDP do), is the loss of the joint batch.
    """

    rank: int = 0
    size: int = 1

    @classmethod
    def current(cls) -> "World":
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that speaks for all."""
        return self.rank == 0

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        """(N, ...) of this process to (size * N, ...) of all, in the order of their ranks; N is the same everywhere."""
        if self.size == 1:
            return rows
        if rows.requires_grad:
            return _GatherRows.apply(rows)
        parts = [torch.empty_like(rows) for _ in range(self.size)]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    def mean(self, values: list[float], device: torch.device) -> list[float]:
        """The mean of each number over the processes."""
        if self.size == 1 or not values:
            return values
        numbers = torch.tensor(values, dtype=torch.float64 if device.type != "mps" else torch.float32, device=device)
        dist.all_reduce(numbers)
        return (numbers / self.size).tolist()

    def smallest(self, values: Sequence[int], device: torch.device) -> list[int]:
        """The smallest of each number over the processes."""
        if self.size == 1:
            return list(values)
        numbers = torch.tensor(values, device=device)
        dist.all_reduce(numbers, op=dist.ReduceOp.MIN)
        return numbers.tolist()


def on_main_process(action: Callable[[], Any]) -> Any:
    """Run `action` in the main process only, and return its result in all of them; the others wait.

    Raises:
        BifocalError: if the action raises one; then every process does.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return action()
    result: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            result = [action()]
        except BifocalError as error:
            result = [error]
    dist.broadcast_object_list(result)
    if isinstance(result[0], BifocalError):
        raise result[0]
    return result[0]
