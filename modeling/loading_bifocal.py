# Copyright 2026 The Bifocal authors. Licensed under the Apache License, Version 2.0.
"""Joint models from other models: a whole dual encoder of transformers, or one text and one image tower."""

import inspect
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoProcessor, AutoTokenizer
from transformers.configuration_utils import PreTrainedConfig

# Not from transformers: without torchvision, releases before 5.14 have a stand-in there that only fails.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from .configuration_bifocal import BifocalConfig, BifocalTextConfig, BifocalVisionConfig
from .modeling_bifocal_text import BifocalTextModel
from .modeling_bifocal_vision import BifocalVisionModel
from .processing_bifocal import BifocalProcessor, image_processor_of_size
from .sentence_settings_bifocal import read_json, sentence_transformers_settings
from .towers_bifocal import (
    DUAL_ENCODERS,
    build_projection,
    longest_text,
    text_family,
    tower_class,
    width_of,
    without_unused_pooler,
)

_SHAPES = ("text_config", "vision_config", "projection_dim", "text_projection", "vision_projection")
_OWN: dict[str, Any] = {
    BifocalTextConfig.model_type: BifocalTextModel,
    BifocalVisionConfig.model_type: BifocalVisionModel,
}


class UnsupportedFamilyError(ValueError):
    """Raised for a dual encoder of an unsupported family."""


def model_kind(source: Any, **hub: Any) -> str:
    """Return "joint" for a folder or Hub id of Bifocal's or another whole dual encoder, else "sentence-transformers".

    A dual encoder to which the files of sentence-transformers add modules, such as a head, counts as a
    sentence-transformers model.

    Args:
        source: folder or Hub id.
        hub: options of the Hub, such as `revision`.

    Raises:
        OSError: if there is no such model.
        ValueError: if it is neither: a tower without the files that say how its tokens become one vector, or a decoder.
    """
    modules = read_json(source, "modules.json", hub)
    try:
        config = read_config(source, **hub)
    except (OSError, ValueError, KeyError):
        if modules is None:
            raise
        return "sentence-transformers"
    added = {module["type"].rsplit(".", 1)[-1] for module in modules or ()} - {"Transformer", "Normalize"}
    if isinstance(config, BifocalConfig) or (is_dual_encoder(config) and not added):
        return "joint"
    if modules is None and config is None:
        raise ValueError(
            f"'{source}' holds no model: it has no config.json with a model_type. Give a model's folder or id."
        )
    if modules is None:
        family = type(config).__name__.removesuffix("Config")
        raise ValueError(
            f"'{source}' is a {family} without the files of sentence-transformers, so Bifocal does not know how to "
            "pool it. Give a dual encoder (Bifocal, CLIP, SigLIP, ...) or a sentence-transformers model."
        )
    return "sentence-transformers"


def is_dual_encoder(config: Any) -> bool:
    """Return whether a configuration is that of a whole dual encoder of transformers."""
    return (
        isinstance(config, PreTrainedConfig)
        and config.model_type != BifocalConfig.model_type
        and hasattr(config, "text_config")
        and hasattr(config, "vision_config")
    )


def read_config(source: Any, **options: Any) -> Any:
    """Return the configuration of a model in a folder or on the Hub; None if it has none that transformers knows.

    Bifocal's own has to be read by its class, since this code may run without being registered.
    """
    values, _ = PreTrainedConfig.get_config_dict(source, **options)
    kind = values.get("model_type")
    if kind == BifocalConfig.model_type:
        return BifocalConfig.from_pretrained(source, **options)
    if kind in _OWN:
        return _OWN[kind].config_class.from_pretrained(source, **options)
    if not kind:
        return None
    return AutoConfig.from_pretrained(source, trust_remote_code=False, **options)


def require_supported(config: Any) -> None:
    """Check that a whole dual encoder is of a family that a joint model can be.

    Raises:
        UnsupportedFamilyError: if it is not.
    """
    _refuse_patches(config.vision_config)
    if config.model_type not in DUAL_ENCODERS:
        name, known = type(config).__name__.removesuffix("Config"), ", ".join(DUAL_ENCODERS)
        raise UnsupportedFamilyError(f"A {name} cannot become a Bifocal model; of whole dual encoders, {known} can.")


def _refuse_patches(config: Any) -> None:
    if config.model_type == "siglip2_vision_model":
        raise UnsupportedFamilyError(
            "This SigLIP 2 takes images as lists of patches (NaFlex), which Bifocal does not support; take one of a "
            "fixed size, such as google/siglip2-base-patch16-224."
        )


def join_dual_encoder(model_class: Any, source: Any, processor: Any = None, **changes: Any) -> Any:
    """Return a dual encoder of transformers as a joint model that shares its towers and weights.

    Args:
        model_class: class of the joint model.
        source: CLIP, SigLIP, MetaCLIP 2, Chinese-CLIP, AltCLIP, ...
        processor: its processor, whose padding token and longest text the joint model gets.
        changes: keys of the joint model's configuration that override the family's.

    Raises:
        UnsupportedFamilyError: if the family's way from a text or an image to a vector is not known.
        ValueError: if a tensor would be unused.
    """
    require_supported(source.config)
    name = type(source).__name__
    text_config, vision_config = source.config.text_config, source.config.vision_config
    own = {name.replace("visual_projection.", "vision_projection.") for name in source.state_dict()}
    text_head = getattr(source, "text_projection", None)
    image_head = getattr(source, "visual_projection", None)
    bias, width = getattr(source, "logit_bias", None), width_of(text_config)
    settings = dict(
        projection_dim=width if text_head is None else text_head.out_features,
        text_projection=_kind(text_head),
        vision_projection=_kind(image_head),
        logit_scale_init_value=source.logit_scale.item(),
        logit_scale_max=BifocalConfig().logit_scale_max if bias is None else None,
        logit_bias_init_value=None if bias is None else bias.item(),
        **_of_tokenizer(text_config, getattr(processor, "tokenizer", None)),
    )
    config = BifocalConfig(text_config=text_config, vision_config=vision_config, **{**settings, **changes})
    fixed = [key for key in changes if key in _SHAPES and getattr(config, key) != settings.get(key)]
    if fixed:
        raise ValueError(f"{fixed[0]} of a {name} is fixed by its weights; omit it.")
    config.dtype = source.dtype
    with torch.device("meta"):
        model = model_class(config)
    model.text_model = without_unused_pooler(source.text_model, config.text_pooling)
    model.vision_model = without_unused_pooler(source.vision_model, config.vision_pooling)
    model.text_projection = text_head if text_head is not None else nn.Identity()
    model.vision_projection = image_head if image_head is not None else nn.Identity()
    model.logit_scale = nn.Parameter(source.logit_scale.detach().reshape(1))
    if bias is not None:
        model.logit_bias = nn.Parameter(bias.detach().reshape(1))
    unused = sorted(own - set(model.state_dict()))
    if unused:
        raise ValueError(f"A {name} cannot become a Bifocal model: its weight '{unused[0]}' would be unused.")
    config._attn_implementation = source.config._attn_implementation
    _forget_paths(model)
    return model.train(source.training)


def load_dual_encoder(model_class: Any, path: Any, hub: dict[str, Any], **options: Any) -> Any:
    """Load a dual encoder of transformers as a joint model with its processor.

    Args:
        model_class: class of the joint model.
        path: folder or Hub id.
        hub: options of the Hub, such as `revision`.
        options: other options of `from_pretrained`.

    Raises:
        ValueError: see `join_dual_encoder`; also if weights are missing.
    """
    require_supported(read_config(path, **hub))
    keys = inspect.signature(BifocalConfig.__init__).parameters
    changes = {key: options.pop(key) for key in list(options) if key in keys}
    if options.pop("output_loading_info", False):
        raise ValueError(f"output_loading_info is for Bifocal's own folders, but '{path}' is another dual encoder.")
    source = load_complete(AutoModel, path, **hub, **options)
    # PIL: with torchvision, transformers' processors resize differently, and vectors would depend on the machine.
    images = _load(AutoImageProcessor, path, {**hub, "backend": "pil"}, "image processor")
    processor = _load(AutoProcessor, path, hub, "processor")
    require_vocabulary(processor.tokenizer, path)
    model = join_dual_encoder(model_class, source, processor, **changes)
    model.processor = BifocalProcessor(images, _adapted(processor.tokenizer, model.config))
    return model


def join_towers(model_class: Any, text: Any, image: Any, hub: dict[str, Any], dtype: Any, **settings: Any) -> Any:
    """Return a joint model of two pretrained towers.

    Args: see `BifocalModel.from_towers`.
    """
    text_tower, text_head, of_text, tokenizer = _load_text_tower(model_class, text, hub, dtype)
    image_tower, of_image, images = _load_image_tower(model_class, image, hub, dtype)
    if settings.get("projection_dim", of_text["projection_dim"]) != of_text["projection_dim"]:
        text_head = None
        settings = {"text_projection": "linear", **settings}
    settings = {**of_text, "text_projection": _kind(text_head), "vision_projection": "linear", **of_image, **settings}
    for name in ("text_projection", "vision_projection"):
        settings[name] = "linear" if settings[name] is True else settings[name]
    config = BifocalConfig(text_config=text_tower.config, vision_config=image_tower.config, **settings)
    for path, tower, pooling in ((text, text_tower, config.text_pooling), (image, image_tower, config.vision_pooling)):
        if pooling == "pooler" and getattr(tower, "_pooler_is_new", False):
            raise ValueError(f"'{path}' has no weights of a pooler; set its pooling to 'mean' or 'class_token'.")
    dtype = torch.promote_types(text_tower.dtype, image_tower.dtype)
    with torch.device("meta"):
        model = model_class(config)
    model.text_model = without_unused_pooler(text_tower, config.text_pooling)
    model.vision_model = without_unused_pooler(image_tower, config.vision_pooling)
    if text_head is None or config.text_projection != _kind(text_head):
        text_head = build_projection(config.text_projection, width_of(config.text_config), config.projection_dim)
        _initialize(model, text_head)
    model.text_projection = text_head
    model.vision_projection = build_projection(
        config.vision_projection, width_of(config.vision_config), config.projection_dim
    )
    _initialize(model, model.vision_projection)
    model.logit_scale = nn.Parameter(torch.full((1,), float(config.logit_scale_init_value)))
    if config.logit_bias_init_value is not None:
        model.logit_bias = nn.Parameter(torch.full((1,), float(config.logit_bias_init_value)))
    model.processor = BifocalProcessor(images, _adapted(tokenizer, config))
    _forget_paths(model)
    model.config.dtype = dtype
    return model.to(dtype).eval()


def _adapted(tokenizer: Any, config: BifocalConfig) -> Any:
    """Return a tokenizer that truncates at the model's longest text and pads on the right.

    Many published ones have no limit. Towers with a position table give other vectors for padding on the left.
    """
    tokenizer.model_max_length = min(tokenizer.model_max_length, config.max_text_length)
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


def _forget_paths(model: Any) -> None:
    """Remove the local paths of the towers, which would be saved with the model."""
    for config in (model.config.text_config, model.config.vision_config):
        config._name_or_path = ""


def _initialize(model: Any, head: nn.Module) -> None:
    for module in head.modules():
        model._init_weights(module)


def _load_text_tower(
    model_class: Any, path: Any, hub: dict[str, Any], dtype: Any
) -> tuple[Any, nn.Module | None, dict[str, Any], Any]:
    """Return a text tower, its head if it has one, its settings in the joint model, and its tokenizer."""
    sentences = sentence_transformers_settings(path, hub)
    lowers = sentences.pop("do_lower_case", False)
    subfolder = {"subfolder": sentences.pop("subfolder")} if sentences.get("subfolder") else {}
    config = _require_config(path, {**hub, **subfolder})
    if is_dual_encoder(config) or config.model_type == BifocalConfig.model_type:
        whole = model_class.from_pretrained(path, dtype=dtype, **hub)
        names = ("text_pooling", "text_padding", "text_attention_mask", "text_pad_token_id", "prompts")
        settings = {name: getattr(whole.config, name) for name in (*names, "max_text_length", "projection_dim")}
        head = None if isinstance(whole.text_projection, nn.Identity) else whole.text_projection
        return whole.text_model, head, settings, whole.processor.tokenizer
    tower = load_complete(_tower_class(config), path, dtype=dtype, **hub, **subfolder)
    if getattr(tower, "main_input_name", "input_ids") != "input_ids":
        raise ValueError(f"'{path}' is a {type(tower).__name__}, which is no text encoder; give one as text tower.")
    tokenizer = _load(AutoTokenizer, path, {**hub, **subfolder}, "tokenizer")
    require_vocabulary(tokenizer, path)
    if lowers and tokenizer("A")["input_ids"] != tokenizer("a")["input_ids"]:
        raise ValueError(
            f"'{path}' lowers its texts in sentence-transformers (do_lower_case) but not in its tokenizer, which a "
            "Bifocal model cannot do."
        )
    settings = {"projection_dim": width_of(config), **_of_tokenizer(config, tokenizer), **sentences}
    return tower, None, settings, tokenizer


def _load_image_tower(model_class: Any, path: Any, hub: dict[str, Any], dtype: Any) -> tuple[Any, dict[str, Any], Any]:
    """Return an image tower, its settings in the joint model, and its image processor."""
    config = _require_config(path, hub)
    _refuse_patches(config)
    if is_dual_encoder(config) or config.model_type == BifocalConfig.model_type:
        whole = model_class.from_pretrained(path, dtype=dtype, **hub)
        settings = {"vision_pooling": whole.config.vision_pooling}
        return whole.vision_model, settings, whole.processor.image_processor
    tower = load_complete(_tower_class(config), path, dtype=dtype, **hub)
    if getattr(tower, "main_input_name", "input_ids") != "pixel_values":
        raise ValueError(f"'{path}' is a {type(tower).__name__}, which is no image encoder; give one as image tower.")
    return tower, {}, _load_image_processor(config, path, hub)


def _load_image_processor(config: Any, path: Any, hub: dict[str, Any]) -> Any:
    """Return the image processor of an image tower; Bifocal's own tower may be saved without one."""
    files = ("preprocessor_config.json", "processor_config.json")
    if config.model_type in _OWN and all(read_json(path, name, hub) is None for name in files):
        return image_processor_of_size(config.image_size)
    return _load(AutoImageProcessor, path, {**hub, "backend": "pil"}, "image processor")


def _tower_class(config: Any) -> Any:
    return _OWN.get(config.model_type) or tower_class(config)


def _require_config(path: Any, hub: dict[str, Any]) -> Any:
    config = read_config(path, **hub)
    if config is None:
        raise ValueError(f"The config.json of '{path}' has no model_type, so its family is unknown.")
    return config


def load_complete(loader: Any, path: Any, **options: Any) -> Any:
    """Load a model; its pooler may be new, since most weights have none, but nothing else.

    Raises:
        ValueError: if weights are missing.
    """
    model, report = loader.from_pretrained(path, output_loading_info=True, **options)
    missing = sorted(name for name in report["missing_keys"] if not name.startswith("pooler."))
    if missing:
        raise ValueError(
            f"'{path}' lacks {len(missing)} weights of a {type(model).__name__}, '{missing[0]}' among them; take a "
            "model that has them all."
        )
    model._pooler_is_new = len(missing) != len(report["missing_keys"])
    return model


def require_vocabulary(tokenizer: Any, path: Any) -> None:
    """Check that a tokenizer was loaded from files: without them, transformers returns one that knows no word.

    Raises:
        ValueError: if it has no tokens besides the special ones.
    """
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        raise ValueError(f"'{path}' has no files of a tokenizer; save the model's tokenizer there.")


def _load(loader: Any, path: Any, options: dict[str, Any], what: str) -> Any:
    try:
        return loader.from_pretrained(path, **options)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"The {what} of '{path}' cannot be loaded ({str(error).splitlines()[0].rstrip('. ')})."
        ) from error


def _kind(head: nn.Module | None) -> bool | str:
    """Return the value of `text_projection` or `vision_projection` for a head."""
    if head is None:
        return False
    if isinstance(head, nn.Linear):
        return "linear" if head.bias is not None else "linear_without_bias"
    return "mlp"


def _of_tokenizer(config: Any, tokenizer: Any) -> dict[str, Any]:
    """Return the settings of a joint model that follow from the tokenizer of its text tower."""
    settings: dict[str, Any] = {}
    if tokenizer is None:
        return settings
    if text_family(config).padding == "max_length":
        settings["text_pad_token_id"] = tokenizer.pad_token_id
    elif tokenizer.model_max_length < longest_text(config):
        settings["max_text_length"] = tokenizer.model_max_length
    return settings
