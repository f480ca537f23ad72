# Copyright 2026 The Bifocal authors. Licensed under the Apache License, Version 2.0.
"""What the configurations share: unknown keys, saved versions of this code, and checks of values."""

import difflib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, ClassVar

from transformers.configuration_utils import PreTrainedConfig
from transformers.generation.configuration_utils import GenerationConfig
from transformers.utils import logging

logger = logging.get_logger(__name__)

VERSION = "0.1.0"  # of this code; stored in saved configs
# Keys that transformers (its Trainer, too) writes to a config or passes through it, besides its base class's keys.
_KEYS_OF_TRANSFORMERS = frozenset(
    [
        "architectures",
        "attn_implementation",
        "auto_map",
        "bifocal_version",
        "bos_token_id",
        "cls_token_id",
        "decoder_start_token_id",
        "dtype",
        "eos_token_id",
        "experts_implementation",
        "id2label",
        "label2id",
        "mask_token_id",
        "model_type",
        "name_or_path",
        "num_labels",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "problem_type",
        "processor_class",
        "quantization_config",
        "return_dict",
        "sep_token_id",
        "tie_word_embeddings",
        "tokenizer_class",
        "torch_dtype",
        "transformers_version",
        "transformers_weights",
        "unk_token_id",
        "use_cache",
    ]
)
# Keys of `PreTrainedConfig.to_dict`: a dict with one of them comes from a saved config, not from a person.
_KEYS_OF_SAVED = ("transformers_version", "model_type")
_reading: ContextVar[bool] = ContextVar("reading a saved config", default=False)


class BifocalBaseConfig(PreTrainedConfig):
    """Base class of the configurations, for which an unknown key is an error, or a warning in a saved config.

    A misspelt size must not be ignored when a person builds a config. In a saved one, the key may come from a trainer,
    another tool or a later release; it is kept as an attribute, as in transformers' own configurations.
    """

    # The class that `auto_map` names for each Auto class, unless a subclass of the model has registered itself.
    auto_models: ClassVar[dict[str, str]] = {}
    # Configurations of Bifocal's own towers, by key.
    own_towers: ClassVar[dict[str, Any]] = {}

    def __init__(self, **kwargs: Any) -> None:
        self._check_keys(kwargs)
        super().__init__(**kwargs)

    def to_dict(self) -> dict[str, Any]:
        """Return `PreTrainedConfig.to_dict` with the version of this code."""
        return super().to_dict() | {"bifocal_version": VERSION}

    def save_pretrained(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> Any:
        """Save as `PreTrainedConfig.save_pretrained` does, with an `auto_map` for all Auto classes of the folder."""
        if self._auto_class is not None:
            self.auto_map = self.auto_models | (getattr(self, "auto_map", None) or {})
        return super().save_pretrained(save_directory, push_to_hub, **kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Load as `PreTrainedConfig.from_dict` does; unknown keys warn, but in a tower's keyword they raise."""
        for name, tower in cls.own_towers.items():
            if isinstance(kwargs.get(name), dict) and kwargs[name].get("model_type") in (None, tower.model_type):
                tower(**{key: value for key, value in kwargs[name].items() if not hasattr(tower(), key)})
        with reading_saved():
            return super().from_dict(config_dict, **kwargs)

    @classmethod
    def from_json_file(cls, json_file: Any) -> Any:
        """Load as `PreTrainedConfig.from_json_file` does; unknown keys are a warning."""
        return cls.from_dict(cls._dict_from_json_file(json_file))

    def _check_keys(self, kwargs: dict[str, Any]) -> None:
        """Check the keys that are not arguments of this class, once all of its arguments are attributes.

        Raises:
            ValueError: if a key is unknown and was not read from a saved config.
        """
        own = {name for name in vars(self) if not name.startswith("_")}
        known = own | _KEYS_OF_TRANSFORMERS | set(PreTrainedConfig().to_dict())
        saved = is_saved(kwargs)
        if saved:  # releases before 5 stored these, too
            known |= set(GenerationConfig().to_dict())
        for key in kwargs:
            if key in known or key.startswith("_"):
                continue
            near = difflib.get_close_matches(key, sorted(own), n=1)
            if saved:
                hint = f"; the nearest known key is '{near[0]}'" if near else ""
                logger.warning(f"The saved {type(self).__name__} has an unknown key '{key}', which is kept{hint}.")
            else:
                hint = f"did you mean '{near[0]}'?" if near else f"its own keys are {', '.join(sorted(own))}."
                raise ValueError(f"{type(self).__name__} has no key '{key}'; {hint}")


def warn_of_other_code(source: str, config: PreTrainedConfig) -> None:
    """Warn if a model was saved with code that may give other numbers than the code that runs it.

    This happens if Bifocal is installed: its code then runs every folder, whatever code the folder contains. Older
    versions cause no warning, since this code is compatible with them.

    Args:
        source: folder or Hub id that the model was loaded from.
        config: its configuration.
    """
    saved = getattr(config, "bifocal_version", None)
    if not isinstance(saved, str):  # another tool may have written anything
        return
    if _numbers(saved) > _numbers(VERSION):
        logger.warning(
            f"'{source}' was saved by Bifocal {saved} but runs with {VERSION}, so its numbers may differ. Upgrade "
            "Bifocal."
        )
        return
    running = Path(__file__).parent
    other = [
        path.name
        for path in sorted(Path(source).glob("*_bifocal*.py"))
        if (running / path.name).exists() and path.read_text("utf-8") != (running / path.name).read_text("utf-8")
    ]
    if saved == VERSION and other:
        logger.warning(
            f"'{source}' contains other code ({', '.join(other)}) than '{running}', which runs it, so its numbers may "
            "differ. To run the folder's code, load it with trust_remote_code=True without importing Bifocal."
        )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)[:3]))


@contextmanager
def reading_saved(saved: bool = True) -> Iterator[None]:
    """Within this context, configurations are read from a saved one (or not), and unknown keys are a warning."""
    token = _reading.set(saved)
    try:
        yield
    finally:
        _reading.reset(token)


def is_saved(kwargs: dict[str, Any]) -> bool:
    """Return whether the keys of a configuration come from a saved one, not from a person."""
    return _reading.get() or any(key in kwargs for key in _KEYS_OF_SAVED)


def require_positive_ints(config: PreTrainedConfig, *names: str) -> None:
    """Check that attributes are positive integers.

    Raises:
        ValueError: if one of the attributes `names` is not a positive integer.
    """
    for name in names:
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
            raise ValueError(f"{type(config).__name__}.{name} must be a positive integer, but it is {value!r}.")


def require_probabilities(config: PreTrainedConfig, *names: str) -> None:
    """Check that attributes are probabilities below 1.

    Raises:
        ValueError: if one of the attributes `names` is not at least 0 and below 1.
    """
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, int | float) or not 0.0 <= value < 1.0:
            raise ValueError(f"{type(config).__name__}.{name} must be at least 0 and below 1, but it is {value!r}.")


def require_heads_divide_width(config: PreTrainedConfig) -> None:
    """Check that the width of a tower is a multiple of its number of heads.

    Raises:
        ValueError: if it is not.
    """
    if config.hidden_size % config.num_attention_heads:
        raise ValueError(
            f"{type(config).__name__}.hidden_size ({config.hidden_size}) must be a multiple of num_attention_heads "
            f"({config.num_attention_heads}); change one of them."
        )
