# Copyright 2026 The Bifocal authors. Licensed under the Apache License, Version 2.0.
"""The options that `encode_text` and `encode_image` share, with the names of sentence-transformers and Jina CLIP."""

import difflib
import operator
from typing import Any

import torch

_OPTIONS = ("batch_size", "max_length", "truncate_dim", "normalize", "convert_to", "show_progress")
_IMAGE_OPTIONS = ("num_workers", "fast_decoding")
_ALIASES = (
    "normalize_embeddings", "convert_to_numpy", "convert_to_tensor", "show_progress_bar", "device", "prompt",
    "prompt_name", "task", "output_value", "precision",
)  # fmt: skip


def whole_number(name: str, value: Any, least: int, most: int | None = None, unit: str = "") -> int:
    """Return an option as an int.

    Raises:
        ValueError: if it is not a whole number from `least` to `most`.
    """
    allowed = f"at least {least}" if most is None else f"from {least} to {most}"
    try:
        number = operator.index(value)
    except TypeError:
        number = least - 1
    if isinstance(value, bool) or number < least or (most is not None and number > most):
        raise ValueError(f"{name} must be {allowed}{unit}, but it is {value!r}.")
    return number


def encoding_options(
    model: Any, method: str, truncate_dim: Any, normalize: Any, convert_to: Any, show_progress: Any, aliases: Any
) -> tuple[int | None, bool, str, bool | None]:
    """Return truncate_dim, normalize, convert_to and show_progress, checked and merged with their aliases.

    Raises:
        TypeError: if a keyword is unknown.
        ValueError: if a value is not valid, contradicts its alias, or is not supported by this model.
    """
    others = _IMAGE_OPTIONS if method == "encode_text" else ("max_length", "prompt")
    known = [name for name in (*_OPTIONS, *_IMAGE_OPTIONS, *_ALIASES) if name not in others]
    for name in aliases:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"its options are {', '.join(known)}."
            raise TypeError(f"{method} has no option '{name}'; {hint}")
    aliases = {name: value for name, value in aliases.items() if value is not None}
    for name in ("prompt_name", "task"):
        if name in aliases and method == "encode_image":
            raise ValueError(f"{name} is {aliases[name]!r}, but only texts have prompts; omit it.")

    def merged(name: str, value: Any, alias: str, other: Any) -> Any:
        if value is not None and other is not None and value != other:
            raise ValueError(
                f"{name}={value!r} and {alias}={aliases[alias]!r} contradict each other; give one of them."
            )
        return other if value is None else value

    if truncate_dim is not None:
        truncate_dim = whole_number("truncate_dim", truncate_dim, 1, model.config.projection_dim)
    normalize = merged("normalize", normalize, "normalize_embeddings", aliases.get("normalize_embeddings"))
    show_progress = merged("show_progress", show_progress, "show_progress_bar", aliases.get("show_progress_bar"))
    if convert_to not in (None, "numpy", "torch", "list"):
        raise ValueError(f"convert_to must be 'numpy', 'torch' or 'list', but it is {convert_to!r}.")
    # As in both libraries, convert_to_tensor overrides convert_to_numpy; without both, the result is a list of tensors.
    if aliases.get("convert_to_tensor"):
        convert_to = merged("convert_to", convert_to, "convert_to_tensor", "torch")
    elif "convert_to_numpy" in aliases:
        kind = "numpy" if aliases["convert_to_numpy"] else "tensors"
        if kind == "numpy" or convert_to is None:
            convert_to = merged("convert_to", convert_to, "convert_to_numpy", kind)
    _require_supported(model, aliases)
    return truncate_dim, normalize is None or bool(normalize), convert_to or "numpy", show_progress


def _require_supported(model: Any, aliases: dict[str, Any]) -> None:
    """Check the options of sentence-transformers and Jina CLIP that this model supports with one value only.

    Raises:
        ValueError: if one has another value.
    """
    if "device" in aliases:
        device, own = torch.device(aliases["device"]), model.device
        if device.type != own.type or device.index not in (None, own.index):
            raise ValueError(f"device is '{device}', but the model is on '{own}'; call model.to('{device}') first.")
    for name, only in (("output_value", "sentence_embedding"), ("precision", "float32")):
        if aliases.get(name, only) != only:
            raise ValueError(f"{name} is {aliases[name]!r}, but only {only!r} is supported.")
