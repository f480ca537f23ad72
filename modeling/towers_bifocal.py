# Copyright 2026 The Bifocal authors. Licensed under the Apache License, Version 2.0.
"""Towers of any family: what differs between them in one table, how one is built, and how its states are pooled."""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_MAPPING,
)

POOLINGS = ("mean", "class_token", "last_token", "pooler")
PADDINGS = ("longest", "max_length")
PROJECTIONS = ("linear", "linear_without_bias", "mlp")
_LONGEST_TEXT = 512  # tokens, for a tower whose configuration has no limit


@dataclass(frozen=True)
class TextFamily:
    """What a joint model must know of a family of text towers.

    Args:
        pooling: "mean" of the states that are not padding; "class_token" or "last_token", the state of the first or the
            last of them; "pooler", the tower's own `pooler_output`.
        padding: "longest", texts are padded to the longest of a batch; "max_length", the tower was trained on texts
            padded to its longest text.
        attention_mask: whether the tower is given the mask; without it, it attends to the padding.
        reserved_positions: rows of the position table that no token uses; RoBERTa counts from `pad_token_id` + 1.
        width: attribute of the configuration with the width of the pooled state.
        prompts: texts that go before a query and a document.
    """

    pooling: str = "mean"
    padding: str = "longest"
    attention_mask: bool = True
    reserved_positions: int = 0
    width: str = "hidden_size"
    prompts: dict[str, str] = field(default_factory=dict)


_ROBERTA = TextFamily(reserved_positions=2)
_SIGLIP = TextFamily("pooler", "max_length", attention_mask=False, width="projection_size")
_JINA_V3_QUERY = "Represent the query for retrieving evidence documents: "
_JINA_V3_DOCUMENT = "Represent the document for retrieval: "
# By `model_type`. Families that are not listed have the defaults.
TEXT_FAMILIES = {
    "altclip_text_model": TextFamily("pooler", reserved_positions=2, width="project_dim"),
    "bifocal_text": TextFamily("pooler"),
    "camembert": _ROBERTA,
    "data2vec-text": _ROBERTA,
    "ibert": _ROBERTA,
    "longformer": _ROBERTA,
    "chinese_clip_text_model": TextFamily("class_token"),
    "clip_text_model": TextFamily("pooler"),
    "jina_embeddings_v3": TextFamily(
        reserved_positions=2, prompts={"query": _JINA_V3_QUERY, "document": _JINA_V3_DOCUMENT}
    ),
    "metaclip_2_text_model": TextFamily("pooler"),
    "mpnet": _ROBERTA,
    "nomic_bert": TextFamily(prompts={"query": "search_query: ", "document": "search_document: "}),
    "roberta": _ROBERTA,
    "roberta-prelayernorm": _ROBERTA,
    "siglip2_text_model": _SIGLIP,
    "siglip_text_model": _SIGLIP,
    "xlm-roberta": _ROBERTA,
    "xlm-roberta-xl": _ROBERTA,
    "xmod": _ROBERTA,
}
# Whole dual encoders by `model_type`, whose vectors are those of their towers by this table.
DUAL_ENCODERS = ("altclip", "chinese_clip", "clip", "metaclip_2", "siglip")
# Pooling of image towers by `model_type`; "pooler" for those that are not listed. ViT's pooler is a layer that its
# published weights do not have.
VISION_POOLINGS = {"beit": "class_token", "data2vec-vision": "class_token", "deit": "class_token", "vit": "class_token"}


def text_family(config: PreTrainedConfig) -> TextFamily:
    """Return the family of a text tower's configuration."""
    return TEXT_FAMILIES.get(config.model_type, TextFamily())


def vision_pooling(config: PreTrainedConfig) -> str:
    """Return the pooling of an image tower's configuration."""
    return VISION_POOLINGS.get(config.model_type, "pooler")


def longest_text(config: PreTrainedConfig) -> int:
    """Return the longest text of a text tower in tokens, special tokens included."""
    rows = getattr(config, "max_position_embeddings", None) or _LONGEST_TEXT
    return int(rows) - text_family(config).reserved_positions


def width_of(config: PreTrainedConfig) -> int:
    """Return the width of a tower's pooled state.

    Raises:
        ValueError: if the configuration does not have it.
    """
    width = getattr(config, text_family(config).width, None) or getattr(config, "hidden_size", None)
    width = width or (getattr(config, "hidden_sizes", None) or [None])[-1]
    if not isinstance(width, int):
        raise ValueError(f"A {type(config).__name__} has no hidden_size, so it cannot be the configuration of a tower.")
    return width


def padded_length(config: Any) -> int | None:
    """Return the length in tokens to which a model's texts are padded; None if it takes any length and a mask.

    Args:
        config: configuration of a joint model, of Bifocal or of another dual encoder.
    """
    text_config = getattr(config, "text_config", None)
    if text_config is None:
        return None
    padding = getattr(config, "text_padding", None) or text_family(text_config).padding
    if padding == "longest":
        return None
    return getattr(config, "max_text_length", None) or longest_text(text_config)


def tower_class(config: PreTrainedConfig) -> Any:
    """Return the class of the model of a tower's configuration.

    Raises:
        ValueError: if the configuration is no encoder's.
    """
    kind = config.model_type
    decoder = kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and kind not in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if decoder or getattr(config, "is_decoder", False) or getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"A tower must be an encoder, but '{kind}' is or has a decoder; give another model.")
    if type(config) in MODEL_MAPPING:
        return MODEL_MAPPING[type(config)]
    # The Auto classes do not know the towers of some dual encoders.
    name = type(config).__name__.removesuffix("Config") + "Model"
    try:
        return getattr(importlib.import_module(type(config).__module__.replace(".configuration_", ".modeling_")), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"'{kind}' has no model that could be a tower; give a text or an image encoder.") from error


def build_tower(config: PreTrainedConfig, pooling: str) -> Any:
    """Return a new tower of another family, without its pooler if `pooling` does not use it.

    A layer without a gradient would stop training on several GPUs.
    """
    tower = tower_class(config)._from_config(config, dtype=torch.get_default_dtype())
    return without_unused_pooler(tower, pooling)


def without_unused_pooler(tower: Any, pooling: str) -> Any:
    """Remove the weights of a tower's pooler if `pooling` does not use them, and return the tower."""
    pooler = getattr(tower, "pooler", None)
    if pooling != "pooler" and isinstance(pooler, nn.Module) and any(True for _ in pooler.parameters()):
        tower.pooler = None
    return tower


def build_projection(kind: bool | str, width: int, output: int) -> nn.Module:
    """Return a head into the shared space; the identity if there is none.

    Args:
        kind: False, or one of `PROJECTIONS`; True is "linear".
        width: width of the tower.
        output: width of the shared space.
    """
    if kind is False:
        return nn.Identity()
    if kind == "mlp":
        return nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, output))
    return nn.Linear(width, output, bias=kind != "linear_without_bias")


def pooled(outputs: Any, attention_mask: torch.Tensor | None, pooling: str) -> torch.Tensor:
    """Return the pooled state (batch, width) of a tower's outputs.

    Args:
        outputs: the tower's outputs.
        attention_mask: (batch, length), 1 for a token and 0 for padding; all are tokens when None.
        pooling: one of `POOLINGS`.

    Raises:
        ValueError: if the tower has no pooler and `pooling` is "pooler", or no list of states and it is another one.
    """
    if pooling == "pooler":
        state = getattr(outputs, "pooler_output", None)
        if state is None:
            raise ValueError(
                f"The tower has no pooled output; set its pooling to {', '.join(map(repr, POOLINGS[:-1]))}."
            )
        return state.flatten(1)  # convolutional towers keep a height and width of 1
    states = outputs.last_hidden_state
    if states.ndim != 3:
        raise ValueError(f"The tower has no list of states to pool by '{pooling}'; set its pooling to 'pooler'.")
    if pooling == "mean":
        if attention_mask is None:
            return states.float().mean(1).to(states.dtype)
        # In float32: bfloat16 is too coarse for a sum over 8,192 tokens.
        mask = attention_mask.unsqueeze(-1).float()
        return ((states.float() * mask).sum(1) / mask.sum(1).clamp(min=1.0)).to(states.dtype)
    if attention_mask is None:
        return states[:, 0 if pooling == "class_token" else -1]
    numbers = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    tokens = attention_mask != 0
    if pooling == "class_token":  # padding may be on the left
        position = torch.where(tokens, numbers, attention_mask.shape[1]).amin(1).clamp(max=attention_mask.shape[1] - 1)
    else:
        position = torch.where(tokens, numbers, 0).amax(1)
    return states.gather(1, position[:, None, None].expand(-1, 1, states.shape[-1])).squeeze(1)


def layers_of(tower: nn.Module) -> Sequence[nn.Module]:
    """Return the blocks of a tower in order: the longest list of modules of one class within it.

    Raises:
        ValueError: if it has no such list.
    """
    lists: list[list[nn.Module]] = [list(module) for module in tower.modules() if isinstance(module, nn.ModuleList)]
    lists = [blocks for blocks in lists if len({type(block) for block in blocks}) == 1]
    if not lists:
        raise ValueError(f"A {type(tower).__name__} has no list of equal layers.")
    return max(lists, key=len)


def search_prompts(prompts: dict[str, str] | None) -> dict[str, str]:
    """Return the prompts of a search, "query" and "document", of a model's prompts; without those that are empty."""
    return {role: prompts[role] for role in ("query", "document") if prompts and prompts.get(role)}


def pooling_settings(config: Any) -> dict[str, Any]:
    """Return the settings of a joint model's configuration that change its vectors without changing its weights."""
    names = ("text_pooling", "vision_pooling", "text_padding", "text_attention_mask", "text_pad_token_id")
    return {name: getattr(config, name) for name in (*names, "max_text_length")}
