"""Reads the tensors of a checkpoint from safetensors or, on request, pickles."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from bifocal.errors import first_line
from bifocal.hub.checkpoint_files import ConversionError, local_copy, read_config, weight_files
from bifocal.hub.weight_layouts import Tensors

_WRAPPERS = ("module.", "_orig_mod.")  # put before every name by DataParallel and torch.compile
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def read_weights(source: str, allow_pickle: bool = False) -> tuple[Tensors, dict[str, Any]]:
    """Return the tensors and the configuration of a Hub id, a folder or a file.

    Args:
        source: Hub id, folder or file.
        allow_pickle: whether to read `.bin`, `.pt` and `.pth`, too (with `weights_only=True`).

    Raises:
        ConversionError: if there are no weights, or only pickles and these are not allowed.
    """
    files = weight_files(local_copy(source, allow_pickle), source, allow_pickle)
    return read_tensors(files), read_config(source, allow_pickle)


def read_tensors(files: Iterable[Path]) -> Tensors:
    """Return the tensors of weights files.

    Raises:
        ConversionError: if one cannot be read.
    """
    tensors: Tensors = {}
    for file in files:
        tensors |= _read(file)
    return tensors


def _read(file: Path) -> Tensors:
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        content = torch.load(file, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise ConversionError(f"'{file}' cannot be read ({first_line(error)}).") from error
    except Exception as error:  # pickle has errors of its own, and weights_only refuses with one of them
        raise ConversionError(
            f"'{file}' holds more than weights, so it is not read. Convert it to safetensors."
        ) from error
    while isinstance(content, Mapping) and not all(isinstance(value, torch.Tensor) for value in content.values()):
        inner = next((content[name] for name in ("state_dict", "module", "model") if name in content), None)
        if inner is None:
            raise ConversionError(f"'{file}' holds no state dict of tensors.")
        content = inner
    return dict(content)


def remove_wrapper_prefix(tensors: Tensors) -> Tensors:
    """Return the tensors without a prefix that DataParallel or torch.compile has put before every name."""
    for wrapper in _WRAPPERS:
        if tensors and all(name.startswith(wrapper) for name in tensors):
            return remove_wrapper_prefix({name.removeprefix(wrapper): tensor for name, tensor in tensors.items()})
    return tensors


def require_floats(name: str, tensor: torch.Tensor) -> None:
    """Check that a weight is of floating point and finite.

    Raises:
        ConversionError: if a weight is not of floating point (quantised, for example) or not finite.
    """
    if tensor.dtype not in _FLOATS:
        kind = str(tensor.dtype).removeprefix("torch.")
        raise ConversionError(f"'{name}' is of type {kind}, not floating point. Give weights that are not quantised.")
    if not tensor.is_meta and not bool(torch.isfinite(tensor).all()):
        raise ConversionError(f"'{name}' holds NaN or infinite numbers. The checkpoint is damaged; fetch it again.")
