"""The dtype that weights are trained in and saved in."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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
