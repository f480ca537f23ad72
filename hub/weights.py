"""Reads a checkpoint: its tensors from safetensors or, on request, pickles, and its JSON files."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from bifocal.errors import first_line, looks_like_path
from bifocal.hub.source_config import ConversionError
from bifocal.hub.weight_layouts import Tensors

_PICKLES = (".bin", ".pt", ".pth")
_ENDINGS = (".safetensors", *_PICKLES)
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
    path = Path(source).expanduser()
    if not path.exists() and (looks_like_path(source) or path.suffix in _ENDINGS):
        raise ConversionError(f"'{source}' does not exist. Give a file, a folder or a Hub id (organisation/name).")
    if not path.exists():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

        patterns = ["*.safetensors", "*.json", *(["*.bin", "*.pt", "*.pth"] if allow_pickle else [])]
        try:
            path = Path(snapshot_download(source, allow_patterns=patterns))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            raise ConversionError(
                f"'{source}' is neither a local path nor available on the Hub ({first_line(error)})."
            ) from error
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    pickled = [path] if path.suffix in _PICKLES else []
    if path.is_dir() and not files:
        pickled = sorted(p for ending in _PICKLES for p in path.glob(f"*{ending}"))
    if pickled and not allow_pickle:
        raise ConversionError(
            f"'{pickled[0]}' is a pickle, which can run code when it is read. Pass --allow-pickle if you trust it (it "
            "is read with weights_only=True)."
        )
    if not files and not pickled:
        raise ConversionError(f"'{source}' holds no weights (*.safetensors).")
    tensors: Tensors = {}
    for file in pickled or files:
        tensors |= _read(file)
    return tensors, read_json(path / "config.json" if path.is_dir() else path.with_name("config.json"))


def read_json(path: Path | None) -> dict[str, Any]:
    """Return the object in a JSON file; empty if there is no such file."""
    if path is None or not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConversionError(f"'{path}' is not valid JSON ({error}). Correct or remove it.") from error
    if not isinstance(content, dict):
        raise ConversionError(f"'{path}' does not hold a JSON object. Correct or remove it.")
    return content


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
