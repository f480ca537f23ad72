"""Checks and preparation of what the losses take: embeddings, temperature, ids."""

import torch

from bifocal.training.engine.distributed import ProcessGroupInfo

SINGLE_PROCESS = ProcessGroupInfo()


def check_pairs(a: torch.Tensor, b: torch.Tensor, reduction: str, label_smoothing: float) -> None:
    """Check the arguments that all pair losses share.

    Raises:
        ValueError: if the shapes do not fit, or an option is out of its range.
    """
    if a.dim() != 2 or a.shape != b.shape or not len(a):
        raise ValueError(
            f"Both sides of a loss must be of one shape (rows, dimensions), not {tuple(a.shape)} and {tuple(b.shape)}."
        )
    if reduction not in ("sum", "mean"):
        raise ValueError(f"reduction must be 'sum' or 'mean', but it is '{reduction}'.")
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"label_smoothing must be at least 0 and below 1, but it is {label_smoothing}.")


def in_float32(
    a: torch.Tensor, b: torch.Tensor, temperature: float | torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return both sides in float32 at least (logits of 16 bits are too coarse), and 1 / tau as a scalar tensor."""
    dtype = torch.promote_types(a.dtype, torch.float32)
    scale = 1.0 / torch.as_tensor(temperature, dtype=dtype, device=a.device).reshape(())
    return a.to(dtype), b.to(dtype), scale


def gather_ids(world: ProcessGroupInfo, *ids: torch.Tensor | None) -> list[torch.Tensor | None]:
    """Return the ids of all processes' rows."""
    return [None if values is None else world.gather(values) for values in ids]


def id_pairs(*pairs: tuple[torch.Tensor | None, torch.Tensor | None]) -> tuple[tuple[torch.Tensor, torch.Tensor], ...]:
    """Return the pairs in which both have ids."""
    return tuple((left, right) for left, right in pairs if left is not None and right is not None)
