"""The dtypes that weights are trained in, passes are computed in, and files are saved in."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bifocal.modeling.dtype_bifocal import multiplies_in_bfloat16
from bifocal.training.checkpoints import checkpoints

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PRECISION = "precision.json"  # in a run's folder: the mixed precision that it began with


def set_master_dtype(model: nn.Module, dtype: torch.dtype) -> set[torch.dtype]:
    """Convert a model's floating point weights in place.

    Of a quantised model only the trained parameters (its adapters) are converted.

    Returns:
        The other dtypes that there were.
    """
    quantised = getattr(model, "hf_quantizer", None) is not None or getattr(model, "is_quantized", False)
    tensors: list[torch.Tensor] = [p for p in model.parameters() if p.requires_grad or not quantised]
    tensors += [] if quantised else list(model.buffers())
    before = {tensor.dtype for tensor in tensors if tensor.is_floating_point()} - {dtype}
    for tensor in tensors:
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)
    return before


@contextmanager
def rounded(model: nn.Module, dtype: torch.dtype | None) -> Iterator[None]:
    """Hold the model's weights in `dtype` within, and restore them afterwards. None changes nothing.

    The same holds for the dtype in its config, which saving the model sets.
    """
    kept = [(p, p.data) for p in model.parameters() if dtype is not None and p.is_floating_point()]
    config = getattr(model, "config", None)
    stated = getattr(config, "dtype", None)
    try:
        for parameter, data in kept:
            parameter.data = data.to(dtype)
        yield
    finally:
        for parameter, data in kept:
            parameter.data = data
        if dtype is not None and config is not None:
            config.dtype = stated


def mixed_precision(settings: dict[str, Any], device: torch.device, begun: str | None = None) -> tuple[str, str]:
    """Return the mixed precision of a recipe's run, and a sentence for the user if it is not what the recipe asks for.

    Args:
        settings: the recipe's training arguments. `bf16` is true, false or "auto", which is the default: on where the
            device multiplies in bfloat16.
        device: device that trains.
        begun: mixed precision of the run that is resumed; None for a new run.

    Returns:
        "bf16", "fp16" or "no", in the words of accelerate.
    """
    asked = {True: "bf16", False: "no"}.get(settings.get("bf16", "auto"), "auto")
    if asked != "bf16" and settings.get("fp16"):
        asked = "fp16"
    if asked == "auto":
        launched = os.environ.get("ACCELERATE_MIXED_PRECISION")  # set by accelerate launch
        asked = launched if launched in ("bf16", "fp16") else "auto"
    is_fast = multiplies_in_bfloat16(device)
    if asked == "auto":
        asked = "bf16" if is_fast else "no"
    if asked == "fp16" and device.type == "cpu":
        return "no", "fp16 is off: a CPU cannot train in float16."
    slow = "" if is_fast else ", although this device does not multiply in it"
    if begun is not None and not (begun == "fp16" and device.type == "cpu"):
        way = "without bf16" if begun == "no" else f"with {begun}"
        slow = slow if begun == "bf16" else ""
        return begun, f"The run began {way}, so it resumes {way}{slow}." if begun != asked or slow else ""
    if asked == "bf16" and device.type == "cpu" and not is_fast:
        return "no", "bf16 is off: this processor does not multiply in bfloat16, so float32 is faster."
    return asked, ""


def begun_precision(folder: Path, settings: dict[str, Any], device: str) -> str | None:
    """Return the mixed precision that a run in a folder began with; None if it has no checkpoint.

    Args:
        folder: folder of the run.
        settings: the recipe's training arguments, by which runs of earlier versions chose.
        device: the recipe's device.
    """
    if not checkpoints(folder):
        return None
    path = folder / PRECISION
    if path.exists():
        try:
            return str(json.loads(path.read_text(encoding="utf-8"))["mixed_precision"])
        except (OSError, ValueError, TypeError, KeyError):
            pass  # somebody changed it, which `open_run` refuses
    if device == "cpu" or not torch.accelerator.is_available():
        return "no"
    return "bf16" if settings.get("bf16") is True else "fp16" if settings.get("fp16") else "no"


def precision_title(args: Any) -> str:
    """Return what a run trains in, in words."""
    halves = {"bf16": "bfloat16", "fp16": "float16"}
    half = halves.get(args.mixed_precision)
    return args.master_dtype if half is None else f"{half} with {args.master_dtype} weights"
