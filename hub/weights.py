"""Reads a checkpoint: its tensors from safetensors or, on request, pickles, and its JSON files."""

import json
from collections.abc import Iterable, Mapping
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
# Weights, settings, vocabularies and the card, but no code.
_DOWNLOADED = ("*.safetensors", "*.json", "*.txt", "*.model", "README.md")
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


def read_config(source: str, allow_pickle: bool = False) -> dict[str, Any]:
    """Return the content of the config.json of a Hub id, a folder or a file's folder; empty if there is none.

    Args: as for `read_weights`.
    """
    path = local_copy(source, allow_pickle)
    return read_json(path / "config.json" if path.is_dir() else path.with_name("config.json"))


def local_copy(source: str, allow_pickle: bool = False) -> Path:
    """Return the local path of a folder or file, or of a Hub id's files, which are downloaded without its code.

    Args: as for `read_weights`.

    Raises:
        ConversionError: if it does not exist.
    """
    path = Path(source).expanduser()
    if path.exists():
        return path
    if looks_like_path(source) or path.suffix in _ENDINGS:
        raise ConversionError(f"'{source}' does not exist. Give a file, a folder or a Hub id (organisation/name).")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = [*_DOWNLOADED, *(["*.bin", "*.pt", "*.pth"] if allow_pickle else [])]
    try:
        return Path(snapshot_download(source, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ConversionError(
            f"'{source}' is neither a local path nor available on the Hub ({first_line(error)})."
        ) from error


def weight_files(path: Path, source: str, allow_pickle: bool = False) -> list[Path]:
    """Return the weights files of a file or a folder.

    Args:
        path: the file or folder.
        source: its name in messages.
        allow_pickle: whether pickles count if there is nothing else.

    Raises:
        ConversionError: if there are none, or only pickles and these are not allowed.
    """
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
    return pickled or files


def read_tensors(files: Iterable[Path]) -> Tensors:
    """Return the tensors of weights files.

    Raises:
        ConversionError: if one cannot be read.
    """
    tensors: Tensors = {}
    for file in files:
        tensors |= _read(file)
    return tensors


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
