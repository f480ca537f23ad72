"""The processes that train together, and gathering their embeddings with gradients."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from bifocal.errors import BifocalError, TrainingError
from bifocal.modeling import BifocalModel


class _GatherRows(torch.autograd.Function):
    """The rows of all processes. In the backward pass, each process gets the sum of the gradients for its rows.

    torch's own differentiable all_gather is deprecated, and its successor is private and not in every torch we support.
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
class ProcessGroupInfo:
    """Rank and number of the processes that train together.

    Each process takes the mean of a loss over its own rows. With gradients averaged over the processes, as DDP and FSDP
    do, that is the loss of the joint batch.
    """

    rank: int = 0
    size: int = 1

    @classmethod
    def current(cls) -> "ProcessGroupInfo":
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    @property
    def is_main(self) -> bool:
        """Whether this process logs and writes for all."""
        return self.rank == 0

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the rows of all processes in the order of their ranks: (N, ...) to (size * N, ...).

        N is the same on every process. In the backward pass, each process gets the sum of the gradients that all
        processes have for its rows.
        """
        if self.size == 1:
            return rows
        return _GatherRows.apply(rows)

    def mean(self, values: list[float], device: torch.device) -> list[float]:
        """Return the mean of each number over the processes."""
        if self.size == 1 or not values:
            return values
        numbers = torch.tensor(values, dtype=torch.float64 if device.type != "mps" else torch.float32, device=device)
        dist.all_reduce(numbers)
        return (numbers / self.size).tolist()

    def smallest(self, values: Sequence[int], device: torch.device) -> list[int]:
        """Return the smallest of each number over the processes."""
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


def set_find_unused(args: Any, model: Any, alternates: bool) -> None:
    """Set whether DDP looks for parameters without a gradient in every step, unless the user has.

    Args:
        args: training arguments, changed in place.
        model: model that is trained.
        alternates: whether batches hold one modality in turn.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if args.ddp_find_unused_parameters is None and (alternates or isinstance(base, BifocalModel)):
        # What no task reaches is known (`without_gradient`); what a batch does not reach, DDP must find.
        args.ddp_find_unused_parameters = alternates


def require_partial_gradients(args: Any, accelerator: Any) -> None:
    """Check that processes can train with steps that reach only some of the parameters, and leave the others alone.

    Args:
        args: training arguments.
        accelerator: accelerate's `Accelerator`.

    Raises:
        TrainingError: if one of the arguments, or the way in which the weights are spread, does not allow it.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    names = ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs")
    reentrant = any((getattr(args, name, None) or {}).get("use_reentrant") for name in names)
    problem = None
    if getattr(accelerator.state, "deepspeed_plugin", None) is not None:
        # Its optimisers step over flat weights, and take a missing gradient for zero.
        problem = "does not work with DeepSpeed, which also moves weights without a gradient; use DDP or FSDP 2"
    elif plugin is not None and plugin.fsdp_version == 1:
        problem = "does not work with FSDP 1, which also moves weights without a gradient; set fsdp_version to 2"
    elif accelerator.num_processes > 1 and plugin is None:
        if args.ddp_find_unused_parameters is False:
            problem = "needs ddp_find_unused_parameters; remove it, or set it to true"
        elif args.ddp_static_graph:
            problem = "does not work with ddp_static_graph; remove that"
        elif reentrant:
            problem = "with several processes needs use_reentrant=False"
    if problem is not None:
        raise TrainingError(f"alternate_modalities {problem}.")


def leave_process_group() -> None:
    """End this process's part in the group; threads of the group that outlive it may abort the process at its exit."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
