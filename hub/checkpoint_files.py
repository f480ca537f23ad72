"""Finds the files of a checkpoint and reads its JSON files. Imports nothing heavy."""

import json
from pathlib import Path
from typing import Any

from bifocal.errors import BifocalError, first_line, looks_like_path

_PICKLES = (".bin", ".pt", ".pth")
_ENDINGS = (".safetensors", *_PICKLES)
# Weights, settings, vocabularies and the card, but no code.
_DOWNLOADED = ("*.safetensors", "*.json", "*.txt", "*.model", "README.md")


class ConversionError(BifocalError):
    """A checkpoint that cannot be converted."""


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


def loaded_files(path: Path, source: str, allow_pickle: bool) -> list[Path]:
    """Return the weights files that transformers loads, of those in a folder; or a single file."""
    if path.is_file():
        return weight_files(path, source, allow_pickle)
    for module in _read_list(path / "modules.json"):  # sentence-transformers may keep the tower in a folder of its own
        if module.get("type", "").endswith(".Transformer") and module.get("path"):
            path = path / module["path"]
    index = path / "model.safetensors.index.json"
    if index.exists():
        return sorted({path / name for name in read_json(index).get("weight_map", {}).values()})
    if (path / "model.safetensors").exists():
        return [path / "model.safetensors"]
    return weight_files(path, source, allow_pickle)


def _read_list(path: Path) -> list[dict[str, Any]]:
    """Return the list of objects in a JSON file; empty if there is no such file.

    Raises:
        ConversionError: if it holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    except ValueError as error:
        raise ConversionError(f"'{path}' is not valid JSON ({error}). Correct or remove it.") from error
    if not isinstance(content, list) or not all(isinstance(entry, dict) for entry in content):
        raise ConversionError(f"'{path}' does not hold a list of JSON objects. Correct or remove it.")
    return content


def require_weights(source: str, allow_pickle: bool = False) -> None:
    """Check that a source exists and has weights that may be read, without reading them. Args: as for `read_weights`.

    Raises:
        ConversionError: if it does not exist or has none.
    """
    path = local_copy(source, allow_pickle)
    try:
        loaded_files(path, source, allow_pickle)
    except ConversionError:
        weight_files(path, source, allow_pickle)


def require_apart(out: Path, source: str) -> None:
    """Check that writing into `out` would not touch a source.

    Raises:
        ConversionError: if `out` is or holds the source.
    """
    path, target = Path(source).expanduser().resolve(), out.expanduser().resolve()
    if path.exists() and path.is_relative_to(target):
        raise ConversionError(f"'{out}' is or holds '{source}', which is read. Choose another folder.")
