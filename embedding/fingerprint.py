"""What decides the vectors of a model that is loaded: its weights, settings and processors, as one hash."""

import hashlib
import json
import tempfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

_NAMES = ("_name_or_path", "name_or_path", "transformers_version")  # of configurations: they decide nothing
_LIBRARIES = ("bifocal", "pillow", "tokenizers", "torch", "transformers")
_STATE = ("truncation", "padding")  # of a fast tokenizer: what its last call set


def model_fingerprint(model: Any, processor: Any = None) -> str:
    """Return a hash that is equal for two models only if the same inputs have the same vectors, batching aside.

    It covers the weights with their dtypes, the device's type, the configuration with its prompts, tokenizer and image
    processor, and the versions of the libraries. A model that is moved to another folder keeps it.

    Args:
        model: a dual encoder or a `SentenceTransformer`.
        processor: processor of a dual encoder; if None, its attribute `processor`.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, value in sorted(model.state_dict().items()):
        if isinstance(value, torch.Tensor):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        else:
            digest.update(f"{name} {value!r}".encode())
    digest.update(json.dumps(_settings(model), sort_keys=True, default=_as_json).encode())
    for part in _processors(model, processor):
        for name, content in _processor_files(part):
            digest.update(f"{name} {len(content)}".encode() + content)
    return digest.hexdigest()


def _settings(model: Any) -> list[Any]:
    """Return what is not in the weights: modules, configurations, prompts, versions."""
    configs = {id(config): config for config in (getattr(module, "config", None) for module in model.modules())}
    known = [config.to_dict() for config in configs.values() if isinstance(config, PreTrainedConfig)]
    names = ("prompts", "default_prompt_name", "truncate_dim", "max_seq_length")  # of a SentenceTransformer
    libraries = {name: _version(name) for name in (*_LIBRARIES, type(model).__module__.partition(".")[0])}
    options = {name: getattr(model, name, None) for name in names}
    device = torch.device(getattr(model, "device", "cpu")).type
    return [type(model).__name__, repr(model), device, _without_names(known), options, libraries]


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:  # the code of a Hub repository
        return ""


def _without_names(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _without_names(inner) for key, inner in value.items() if key not in _NAMES}
    return [_without_names(inner) for inner in value] if isinstance(value, list) else value


def _as_json(value: Any) -> Any:
    return sorted(map(str, value)) if isinstance(value, set) else repr(value)


def _processors(model: Any, processor: Any) -> list[Any]:
    """Return what turns texts and images into a model's inputs; for a `SentenceTransformer`, that of each module."""
    if processor is not None:
        return [processor]
    owners = [model] if hasattr(model, "encode_image") else model.modules()
    parts = [getattr(owner, "processor", None) or getattr(owner, "tokenizer", None) for owner in owners]
    return list({id(part): part for part in parts if part is not None}.values())


def _processor_files(part: Any) -> Iterator[tuple[str, bytes]]:
    """Yield the files of a processor by name, as they would be saved."""
    if not hasattr(part, "save_pretrained"):  # of a module that is no transformer
        serialised = part.to_str() if hasattr(part, "to_str") else json.dumps(vars(part), default=_as_json)
        yield type(part).__name__, serialised.encode("utf-8", "surrogatepass")
        return
    with tempfile.TemporaryDirectory(prefix="bifocal-processor-") as scratch:
        part.save_pretrained(scratch)
        for path in sorted(Path(scratch).rglob("*")):
            if path.is_file():
                content = path.read_bytes()
                if path.suffix == ".json":
                    values = {name: value for name, value in json.loads(content).items() if name not in _STATE}
                    content = json.dumps(_without_names(values), sort_keys=True).encode()
                yield path.relative_to(scratch).as_posix(), content
