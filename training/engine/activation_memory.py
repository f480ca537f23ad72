"""What autograd keeps of a forward pass, measured, and how much memory is free for it."""

import ctypes
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from bifocal.modeling.alibi_bifocal import AlibiBias
from bifocal.training.engine.joint_forward import embed

SHARE = 0.6  # of the free memory; the rest is for what a pass needs besides, and what libraries need
_CGROUPS, _OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def free_memory(device: torch.device) -> int:
    """Return the bytes that this process can still use: on the GPU, or its part of the machine's or container's."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    import psutil

    available = min([psutil.virtual_memory().available, *_rooms_of_cgroups()])
    return max(0, available) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def trim_heap() -> None:
    """Give free memory of the heap back to the system, where the C library can (glibc).

    It keeps what was freed for later use, gigabytes after a step of training, and the system counts that as used.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def _rooms_of_cgroups() -> Iterator[int]:
    """Yield the bytes that each limit on this process's group or a group around it leaves (Linux, containers)."""
    try:
        lines = _OWN_CGROUPS.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, names = _CGROUPS, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            root, names = _CGROUPS / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            if folder == root.parent:
                break
            try:
                limit, used = ((folder / name).read_text().strip() for name in names[:2])
                stat = dict(entry.split() for entry in (folder / "memory.stat").read_text().splitlines())
            except OSError:  # not every group has a limit, and a container sees its own only
                continue
            if limit != "max":
                yield int(limit) - int(used) + int(stat.get(names[2], 0))  # files read can be read again


def kept_for_backward(model: nn.Module, texts: list[Any], images: list[Any], args: Any) -> int:
    """Return the bytes of distinct tensors, parameters and inputs aside, that autograd keeps from one forward pass.

    Neither the random state nor a buffer of the model changes.
    """
    present = [*model.parameters(), *model.buffers(), *(v for part in (*texts, *images) for v in part.values())]
    own = {tensor.untyped_storage().data_ptr() for tensor in present}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # a tensor with its graph would hold that graph forever, since no backward pass follows

    def keep_shared(layer: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
        """Count the ALiBi bias that checkpointed layers share: no hook of autograd sees it."""
        for value in (*inputs, *options.values()):
            if isinstance(value, AlibiBias) and value.whole is not None:
                keep(value.whole)

    half = torch.bfloat16 if args.bf16 else torch.float16
    device = next(model.parameters()).device
    layers = [layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer)]
    with (
        _pre_hooks([layer for layer in layers if layer.gradient_checkpointing], keep_shared),
        _buffers_restored(model),
        # Of this device only: by default, each process of a run would open every GPU of the machine, and warn.
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast(device.type, dtype=half, enabled=args.bf16 or args.fp16),
    ):
        outputs = embed(model, texts, images)
    del outputs
    return sum(kept.values())


@contextmanager
def _pre_hooks(modules: Sequence[nn.Module], hook: Any) -> Iterator[None]:
    """Call a hook with the inputs of each module within."""
    handles = [module.register_forward_pre_hook(hook, with_kwargs=True) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _buffers_restored(model: nn.Module) -> Iterator[None]:
    """Set the buffers back afterwards, such as the statistics of batch normalisation."""
    buffers = list(model.buffers())
    before = [buffer.clone() for buffer in buffers]
    yield
    with torch.no_grad():
        for buffer, value in zip(buffers, before, strict=True):
            buffer.copy_(value)
