"""What decides the vectors of a model that is loaded: its weights, settings and processors, as one hash."""

import hashlib
import json
import tempfile
from collections.abc import Iterator
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from bifocal import modeling

_NAMES = ("_name_or_path", "name_or_path", "transformers_version")  # of configurations: they decide nothing
_LIBRARIES = ("pillow", "tokenizers", "torch", "torchvision", "transformers")
_STATE = ("truncation", "padding")  # of a fast tokenizer: what its last call set
_OF_ADAPTERS = ("_active_adapter", "_disable_adapters")  # private attributes of modules that decide vectors
_OF_EVERY_MODULE = {*vars(torch.nn.Module()), "warnings_issued"}  # attributes that decide nothing


def model_fingerprint(model: Any, processor: Any = None) -> str:
    """Return a hash that is equal for two models only if the same inputs have the same vectors, batching aside.

    It covers the weights with their dtypes, the device's type, the configuration with its prompts, the settings of each
    module, tokenizer and image processor, our code that embeds, and the versions of the libraries. A model that is
    moved to another folder keeps it.

    Args:
        model: a dual encoder or a `SentenceTransformer`.
        processor: processor of a dual encoder; if None, its attribute `processor`.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, value in sorted(model.state_dict().items()):
        if isinstance(value, torch.Tensor):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        else:
            digest.update(f"{name} {value!r}".encode())
    digest.update(json.dumps(_settings(model), sort_keys=True, default=_as_json).encode())
    for part in _processors(model, processor):
        for name, content in _processor_files(part):
            digest.update(f"{name} {len(content)}".encode() + content)
    return digest.hexdigest()


def _settings(model: Any) -> list[Any]:
    """Return what is not in the weights: modules and their settings, configurations, prompts, code."""
    configs = {id(config): config for config in (getattr(module, "config", None) for module in model.modules())}
    known = [config.to_dict() for config in configs.values() if isinstance(config, PreTrainedConfig)]
    modules = {name: [type(module).__name__, *_module_settings(module)] for name, module in model.named_modules()}
    packages = {*_LIBRARIES, *(type(module).__module__.partition(".")[0] for module in model.modules())}
    libraries = {name: _version(name) for name in packages}
    device = torch.device(getattr(model, "device", "cpu")).type
    longest = getattr(model, "max_seq_length", None)  # of a SentenceTransformer
    return [repr(model), device, longest, _without_names([known, modules]), libraries, _code_hash()]


def _module_settings(module: torch.nn.Module) -> tuple[dict[str, Any], list[str]]:
    """Return the attributes of a module that are plain values, and the names of its hooks.

    A module of any library may keep settings there: the scale of an adapter, for example.
    """
    attributes = {
        name: value for name, value in vars(module).items()
        if name not in _OF_EVERY_MODULE and (name in _OF_ADAPTERS or not name.startswith("_")) and _is_plain(value)
    }  # fmt: skip
    hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    return attributes, [getattr(hook, "__qualname__", type(hook).__qualname__) for hook in hooks]


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    if isinstance(value, list | tuple | set):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, str | int | float)


@cache
def _code_hash() -> str:
    """Return a hash of our code that embeds: between two releases it may change, but the version does not."""
    digest = hashlib.blake2b(digest_size=16)
    for folder in (Path(modeling.__file__).parent, Path(__file__).parent):
        for path in sorted(folder.rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:  # the code of a Hub repository
        return ""


def _without_names(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _without_names(inner) for key, inner in value.items() if key not in _NAMES}
    return [_without_names(inner) for inner in value] if isinstance(value, list | tuple) else value


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
    """Yield the classes of a processor, and its files by name as they would be saved."""
    inner_parts = [inner for inner in getattr(part, "__dict__", {}).values() if hasattr(inner, "save_pretrained")]
    # Of two with equal files, one may resize with torchvision and the other with Pillow.
    yield "classes", " ".join(type(inner).__qualname__ for inner in (part, *inner_parts)).encode()
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
                    state = _STATE if path.name == "tokenizer.json" else ()
                    values = {name: value for name, value in json.loads(content).items() if name not in state}
                    content = json.dumps(_without_names(values), sort_keys=True).encode()
                yield path.relative_to(scratch).as_posix(), content
