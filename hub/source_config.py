"""Derives a Bifocal configuration from a checkpoint: from its tensors, its stored rotary tables and its config.json.

A key of config.json that contradicts the tensors, or sets an architecture that Bifocal's towers do not have, is an
error that names the key: without it, the converted model would give other vectors than its source.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from transformers import JinaEmbeddingsV3Config

from bifocal.hub.checkpoint_files import ConversionError
from bifocal.hub.weight_layouts import XLM_R_FLASH, Tensors, TowerLayout, WeightLayout
from bifocal.modeling import BifocalConfig, BifocalTextConfig, BifocalVisionConfig

_HEAD_WIDTH = 64  # of both towers in all published sizes
# Each size and its names in configurations: transformers' name and EVA-CLIP's.
_SIZES: dict[str, dict[str, tuple[str, ...]]] = {
    "text": {
        "hidden_size": ("hidden_size",),
        "num_hidden_layers": ("num_hidden_layers",),
        "num_attention_heads": ("num_attention_heads",),
        "intermediate_size": ("intermediate_size",),
        "vocab_size": ("vocab_size",),
        "type_vocab_size": ("type_vocab_size",),
    },
    "vision": {
        "hidden_size": ("hidden_size", "width"),
        "num_hidden_layers": ("num_hidden_layers", "layers"),
        "num_attention_heads": ("num_attention_heads",),
        "intermediate_size": ("intermediate_size",),
        "patch_size": ("patch_size",),
    },
}
# Settings that change the computation but no tensor, and the values that Bifocal's towers implement.
_ARCHITECTURE: dict[str, dict[str, tuple[Any, ...]]] = {
    "text": {
        "position_embedding_type": ("alibi",),
        "feed_forward_type": ("geglu", "reglu"),
        "pooler_type": ("mean_pooler",),
        "emb_pooler": ("mean",),
    },
    "XLM-R text": {
        "position_embedding_type": ("rotary",),
        "hidden_act": ("gelu",),
        "pooler_type": ("mean_pooler",),
        "emb_pooler": ("mean",),
        "default_instruction_task": (),
        "proj_type": (),
    },
    "vision": {
        "post_norm": (False,),
        "rope_embeddings": (True,),
        "subln": (True,),
        "naive_swiglu": (True,),
        "qkv_bias": (True,),
        "use_mean_pooling": (False,),
        "global_average_pool": (False,),
    },
}
_GATES = {"geglu": "gelu", "reglu": "relu"}
# Settings that are copied by name: they change training or a norm, and no tensor shows them.
_COPIED = {
    "text": ("layer_norm_eps", "hidden_dropout_prob", "attention_probs_dropout_prob", "initializer_range"),
    "vision": ("layer_norm_eps", "patch_dropout", "initializer_range"),
    "XLM-R text": (
        "layer_norm_eps", "hidden_dropout_prob", "attention_probs_dropout_prob", "initializer_range",
        "max_position_embeddings", "pad_token_id", "bos_token_id", "eos_token_id",
    ),
}  # fmt: skip
_LARGEST_REFERENCE = 129  # EVA02's is 16; grids of published towers reach 37
# float16 holds angles near 1 to 5e-4, bfloat16 to 4e-3.
_TABLE_TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1e-2}


def derive_config(
    converted: Tensors, towers: Mapping[str, TowerLayout], source_config: Mapping[str, Any], stored: Tensors
) -> Any:
    """Return the configuration of the Bifocal model with these tensors.

    Args:
        converted: the tensors by Bifocal's names.
        towers: layout and prefix of each tower in the source.
        source_config: the source's configuration: that of a joint model with `text_config` and `vision_config`, or that
            of the tower.
        stored: the source's tensors by its own names, for tables that show what no weight does.

    Raises:
        ConversionError: if the configuration contradicts tensors or tables, or sets another architecture.
    """
    both = len(towers) == 2
    text: Any = None
    vision: Any = None
    options: dict[str, Any] = {}
    if "text" in towers:
        layout, prefix = towers["text"]
        own, settings = "text_model." if both else "", tower_settings(source_config, "text")
        if layout is XLM_R_FLASH:
            text, options = _xlm_r_config(converted, own, settings), _options(source_config, settings)
        else:
            text = _text_config(converted, own, settings, prefix, stored)
    if "vision" in towers:
        layout, prefix = towers["vision"]
        own = "vision_model." if both else ""
        vision = _vision_config(converted, own, tower_settings(source_config, "vision"), layout, prefix, stored)
    if not both:
        return text or vision
    assert text is not None and vision is not None  # noqa: PT018
    shared = converted.get("vision_projection.weight")
    config = BifocalConfig(
        text_config=text, vision_config=vision, text_projection=False, vision_projection=shared is not None,
        projection_dim=text.hidden_size if shared is None else shared.shape[0], **options,
    )  # fmt: skip
    _require_equal(source_config, "projection_dim", "projection_dim", config.projection_dim, "joint model")
    for tower in ("text", "vision"):
        settings = source_config.get(f"{tower}_config") or {}
        _require_equal(settings, "embed_dim", "projection_dim", config.projection_dim, tower)
    return config


def _required(converted: Tensors, name: str) -> torch.Tensor:
    """Return a tensor by Bifocal's name.

    Raises:
        ConversionError: if the source has no tensor that it is made of.
    """
    if name not in converted:
        raise ConversionError(f"1 tensor is missing: what '{name}' is made of.")
    return converted[name]


def tower_settings(source_config: Mapping[str, Any], tower: str) -> dict[str, Any]:
    """Return a tower's part of a configuration, overridden by jina-clip's `hf_model_config_kwargs`."""
    settings = dict(source_config.get(f"{tower}_config") or source_config)
    return settings | dict(settings.get("hf_model_config_kwargs") or {})


def _text_config(
    converted: Tensors, own: str, settings: Mapping[str, Any], prefix: str, stored: Tensors
) -> BifocalTextConfig:
    _require_architecture(settings, "text")
    words = _required(converted, f"{own}embeddings.word_embeddings.weight")
    width = words.shape[1]
    alibi = stored.get(f"{prefix}encoder.alibi")
    config = BifocalTextConfig(
        vocab_size=words.shape[0], hidden_size=width, num_hidden_layers=_num_layers(converted, own),
        num_attention_heads=_heads(width, settings, "text", None if alibi is None else alibi.shape[1]),
        intermediate_size=_required(converted, f"{own}layers.0.mlp.gate_up_proj.weight").shape[0] // 2,
        hidden_act=_GATES[settings.get("feed_forward_type") or "geglu"],
        type_vocab_size=_required(converted, f"{own}embeddings.token_type_embeddings.weight").shape[0],
        max_position_embeddings=int(settings.get("max_position_embeddings", 8192)),
        pad_token_id=settings.get("pad_token_id", 0), **_copied(settings, "text"),
    )  # fmt: skip
    _require_sizes(settings, config, "text")
    return config


def _xlm_r_config(converted: Tensors, own: str, settings: Mapping[str, Any]) -> JinaEmbeddingsV3Config:
    """Return the configuration of jina-clip-v2's text tower.

    Its config.json only has what differs from jina-embeddings-v3, whose values are those of transformers' class.
    """
    _require_architecture(settings, "XLM-R text")
    words = _required(converted, f"{own}embeddings.word_embeddings.weight")
    copied = _copied(settings, "XLM-R text")
    if (theta := settings.get("rotary_emb_base")) is not None:
        copied["rope_parameters"] = {"rope_type": "default", "rope_theta": float(theta)}
    config = JinaEmbeddingsV3Config(
        vocab_size=words.shape[0], hidden_size=words.shape[1], num_hidden_layers=_num_layers(converted, own),
        num_attention_heads=_heads(words.shape[1], settings, "text", None),
        intermediate_size=_required(converted, f"{own}layers.0.mlp.fc1.weight").shape[0],
        type_vocab_size=_required(converted, f"{own}embeddings.token_type_embeddings.weight").shape[0], **copied,
    )  # fmt: skip
    _require_sizes(settings, config, "text")
    return config


def _options(source_config: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of jina-clip-v2's joint model: its prompts by their names here, and its dimensions."""
    for key, value in (("add_projections", False), ("truncate_dim", None)):
        if source_config.get(key) not in (None, value):
            raise ConversionError(
                f"The source's configuration says {key}={source_config[key]!r}, but a Bifocal model has {value!r}. Its "
                "vectors would differ."
            )
    names = {"retrieval.query": "query", "retrieval.passage": "document"}
    prompts = {names.get(task, task): text for task, text in (settings.get("task_instructions") or {}).items()}
    return {"prompts": prompts, "matryoshka_dimensions": source_config.get("matryoshka_dimensions")}


def _vision_config(
    converted: Tensors, own: str, settings: Mapping[str, Any], layout: WeightLayout, prefix: str, stored: Tensors
) -> BifocalVisionConfig:
    _require_architecture(settings, "vision")
    patches = _required(converted, f"{own}embeddings.patch_embedding.weight")
    positions = _required(converted, f"{own}embeddings.position_embedding")
    width, patch = patches.shape[0], patches.shape[-1]
    grid = math.isqrt(positions.shape[1] - 1)
    if positions.ndim != 3 or grid * grid != positions.shape[1] - 1:
        raise ConversionError(f"The position table has {positions.shape[1]} rows, not a square number and one more.")
    tables = _rotary_tables(stored, prefix)
    head_width = None if tables is None else tables[0].shape[-1]
    if head_width is not None and width % head_width:
        raise ConversionError(f"The rotary tables have {head_width} columns, which do not divide the width {width}.")
    heads = _heads(width, settings, "vision", None if head_width is None else width // head_width)
    theta, reference = 10_000.0, _configured_reference(settings, grid)
    if tables is not None:
        theta, stored_reference = _read_tables(*tables, grid)
        if reference is not None and reference != stored_reference:
            raise ConversionError(
                f"The source's configuration counts rotary positions to {reference} (pt_hw_seq_len="
                f"{settings.get('pt_hw_seq_len')}, intp_freq={settings.get('intp_freq', False)}), its stored tables "
                f"(rope.freqs_cos) to {stored_reference}. Correct the one that is wrong."
            )
        reference = stored_reference
    if reference is None:  # jina-clip-v1 counts positions in its own grid, EVA02-CLIP and timm in one of 16
        reference = grid if own else layout.rope_reference
    config = BifocalVisionConfig(
        hidden_size=width, num_hidden_layers=_num_layers(converted, own), num_channels=patches.shape[1],
        num_attention_heads=heads, patch_size=patch, image_size=grid * patch, rope_theta=theta,
        intermediate_size=_required(converted, f"{own}layers.0.mlp.gate_proj.weight").shape[0],
        rope_reference_grid=reference, **_copied(settings, "vision"),
    )  # fmt: skip
    _require_sizes(settings, config, "vision")
    side = settings.get("image_size")
    if isinstance(side, int) and side // patch == grid:  # the last pixels that do not fill a patch are not seen
        config.image_size = side
    _require_equal(settings, "image_size", "image_size", config.image_size, "vision")
    if "mlp_ratio" in settings:
        inner = int(width * settings["mlp_ratio"])
        _require_equal({"mlp_ratio": inner}, "mlp_ratio", "intermediate_size", config.intermediate_size, "vision")
    return config


def _configured_reference(settings: Mapping[str, Any], grid: int) -> int | None:
    """Return the grid that rotary positions are scaled to in EVA-CLIP's configurations; None if they do not set it.

    With `intp_freq` position i of a grid of g counts as i / g * pt_hw_seq_len; without, positions are not scaled, which
    only works on a grid of `pt_hw_seq_len` itself.
    """
    pretrained = settings.get("pt_hw_seq_len")
    if pretrained is None:
        return None
    if not settings.get("intp_freq", False) and pretrained != grid:
        raise ConversionError(
            f"The source's configuration says pt_hw_seq_len={pretrained} without intp_freq, but its position table is "
            f"a grid of {grid} x {grid}. Set intp_freq or pt_hw_seq_len={grid} in its config.json."
        )
    return int(pretrained)


def _rotary_tables(stored: Tensors, prefix: str) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return the stored cosines and sines, each (patches, head width); None if there are none.

    Raises:
        ConversionError: if the blocks hold different tables.
    """
    pattern = re.compile(re.escape(prefix) + r"(blocks\.\d+\.attn\.)?rope\.freqs_(cos|sin)")
    tables: dict[str, torch.Tensor] = {}
    for name, tensor in stored.items():
        if (match := pattern.fullmatch(name)) is None or tensor.is_meta:
            continue
        first = tables.setdefault(match.group(2), tensor)
        if first.shape != tensor.shape or not torch.allclose(first.float(), tensor.float(), atol=1e-6):
            raise ConversionError(
                f"'{name}' differs from the rotary tables of other blocks, but Bifocal's layers share one."
            )
    if not tables:
        return None
    if set(tables) != {"cos", "sin"} or tables["cos"].shape != tables["sin"].shape or tables["cos"].ndim != 2:
        raise ConversionError(
            "The rotary tables rope.freqs_cos and rope.freqs_sin are incomplete or of different shapes."
        )
    return tables["cos"], tables["sin"]


def _read_tables(cos: torch.Tensor, sin: torch.Tensor, grid: int) -> tuple[float, int]:
    """Return base and reference grid of rotary tables, verified by computing the tables again.

    Raises:
        ConversionError: if they are of another grid, or not tables of EVA02's 2D rotary embedding.
    """
    if cos.shape[0] != grid * grid:
        raise ConversionError(
            f"The rotary tables have {cos.shape[0]} rows, but the position table is a grid of {grid} x {grid}."
        )
    tolerance = _TABLE_TOLERANCE.get(cos.dtype, 1e-4)
    cos, sin = cos.double(), sin.double()
    frequencies = cos.shape[1] // 4
    thetas = [10_000.0]
    if frequencies > 1 and grid > 1:
        # The second patch is one column to the right, and the columns' half starts in the middle: its first two angles.
        first, second = torch.atan2(sin, cos)[1, [2 * frequencies, 2 * frequencies + 2]].tolist()
        thetas += [(first / second) ** frequencies] if first > 0 and second > 0 else []
    for theta in thetas:
        turns = theta ** -(torch.arange(frequencies, dtype=torch.float64) / frequencies)
        for reference in (grid, *range(1, _LARGEST_REFERENCE)):
            angles = torch.outer(torch.arange(grid, dtype=torch.float64) / grid * reference, turns)
            angles = angles.repeat_interleave(2, dim=1)
            expected = torch.cat([angles.repeat_interleave(grid, dim=0), angles.repeat(grid, 1)], dim=1)
            if torch.allclose(expected.cos(), cos, atol=tolerance) and torch.allclose(
                expected.sin(), sin, atol=tolerance
            ):
                return theta, reference
    raise ConversionError("The rotary tables (rope.freqs_cos) are not those of EVA02's 2D rotary embedding.")


def _heads(width: int, settings: Mapping[str, Any], tower: str, stored: int | None) -> int:
    """Return the number of heads: of a stored table, or else of the configuration, or else for heads 64 wide."""
    configured = settings.get("num_attention_heads")
    if configured is None and settings.get("head_width"):
        configured = width // int(settings["head_width"])
    if stored is not None and configured is not None and int(configured) != stored:
        raise ConversionError(
            f"The source's configuration gives the {tower} tower {configured} heads, its stored tables {stored}. "
            "Correct num_attention_heads or head_width in its config.json."
        )
    heads = stored if stored is not None else configured
    if heads is None and width % _HEAD_WIDTH:
        raise ConversionError(
            f"The {tower} tower is {width} wide, and its number of heads is unknown. Add num_attention_heads to "
            "its config.json."
        )
    return int(heads) if heads is not None else width // _HEAD_WIDTH


def _num_layers(converted: Tensors, own: str) -> int:
    numbers = {int(m.group(1)) for name in converted if (m := re.match(re.escape(own) + r"layers\.(\d+)\.", name))}
    return max(numbers, default=-1) + 1


def _copied(settings: Mapping[str, Any], tower: str) -> dict[str, Any]:
    return {name: settings[name] for name in _COPIED[tower] if settings.get(name) is not None}


def _require_architecture(settings: Mapping[str, Any], tower: str) -> None:
    for key, supported in _ARCHITECTURE[tower].items():
        value = settings.get(key)
        if value is not None and value not in supported:
            raise ConversionError(
                f"The source's configuration says {key}={value!r} of the {tower.split()[-1]} tower, but Bifocal's "
                f"computes {' or '.join(map(repr, supported)) or 'without'}. Its vectors would differ."
            )


def _require_sizes(settings: Mapping[str, Any], config: Any, tower: str) -> None:
    for size, names in _SIZES[tower].items():
        for name in names:
            _require_equal(settings, name, size, getattr(config, size), tower)


def _require_equal(settings: Mapping[str, Any], key: str, size: str, expected: int, tower: str) -> None:
    value = settings.get(key)
    if isinstance(value, int) and value != expected:
        shown = f"{key}={value}" if key != "mlp_ratio" else f"an mlp_ratio that makes {size}={value}"
        raise ConversionError(
            f"The source's configuration says {shown} of the {tower}{'' if 'model' in tower else ' tower'}, its "
            f"tensors {expected}. Correct it in its config.json."
        )
