# Copyright 2026 The Bifocal authors. Licensed under the Apache License, Version 2.0.
"""What the files of sentence-transformers say about a text tower."""

import json
import os
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

_POOLINGS = {  # of sentence-transformers
    "cls": "class_token",
    "cls_token": "class_token",
    "lasttoken": "last_token",
    "mean": "mean",
    "mean_tokens": "mean",
}


def sentence_transformers_settings(path: Any, hub: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a joint model that the files of sentence-transformers name; empty without such files.

    Args:
        path: folder or Hub id.
        hub: options of the Hub, such as `revision`.

    Returns:
        Keys of the configuration; also `subfolder`, if the tower is in one, and `do_lower_case`, if it is set.

    Raises:
        ValueError: if a module or setting has no counterpart in a Bifocal model.
    """
    modules = read_json(path, "modules.json", hub)
    if modules is None:
        return {}
    settings: dict[str, Any] = {}
    include_prompt = True
    for module in modules:
        kind = module["type"].rsplit(".", 1)[-1]
        folder = module.get("path", "")
        if kind == "Transformer":
            own = read_json(path, os.path.join(folder, "sentence_bert_config.json"), hub) or {}
            settings |= {"max_text_length": own.get("max_seq_length"), "subfolder": folder or None}
            settings["do_lower_case"] = own.get("do_lower_case") or None
        elif kind == "Pooling":
            pooling = read_json(path, os.path.join(folder, "config.json"), hub) or {}
            settings["text_pooling"] = _pooling(path, pooling)
            include_prompt = pooling.get("include_prompt", True)
        elif kind != "Normalize":
            raise ValueError(f"'{path}' has a {kind} module of sentence-transformers, which a text tower cannot have.")
    own = read_json(path, "config_sentence_transformers.json", hub) or {}
    prompts = {name: text for name, text in (own.get("prompts") or {}).items() if text}
    if prompts:
        settings["prompts"] = prompts
    if prompts and not include_prompt:
        raise ValueError(
            f"'{path}' leaves its prompts out of the mean (include_prompt is false), which a Bifocal model cannot do."
        )
    if own.get("default_prompt_name"):
        raise ValueError(
            f"'{path}' has the default prompt '{own['default_prompt_name']}', but a Bifocal model has none by default. "
            "Remove default_prompt_name from a copy of the folder, and name the prompt when you encode."
        )
    return {name: value for name, value in settings.items() if value is not None}


def _pooling(path: Any, config: dict[str, Any]) -> str:
    """Return the pooling of a Pooling module's configuration, in its older and its newer form."""
    older = [
        name.removeprefix("pooling_mode_")
        for name, value in config.items()
        if name != "include_prompt" and value is True
    ]
    modes = config.get("pooling_mode") or older or ["mean"]
    modes = [modes] if isinstance(modes, str) else list(modes)
    if len(modes) != 1 or modes[0] not in _POOLINGS:
        raise ValueError(f"'{path}' pools its tokens by '{' and '.join(modes)}', which a Bifocal model cannot do.")
    return _POOLINGS[modes[0]]


def read_json(path: Any, name: str, hub: dict[str, Any]) -> Any:
    """Return the content of a JSON file in a folder or on the Hub; None without it."""
    file = cached_file(
        path, name, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False, **hub
    )
    return None if file is None else json.loads(Path(file).read_text("utf-8"))
