"""The layouts in which weights of the two towers are published, as rules that map their names to Bifocal's.

Facts: JinaBERT v2's names are those of BERT with a gated feed-forward (arXiv 2310.19923); its "flash" form, which
jina-clip-v1 holds, fuses query, key and value. EVA02's names are those of EVA-CLIP (arXiv 2303.15389), which
jina-clip-v1 and open_clip keep, and those of timm. The feed-forward of the flash form has two spellings; both are
accepted. jina-clip-v2's text tower is XLM-R with rotary positions (arXiv 2409.10173) in the flash form.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Rule:
    """Maps one tensor of a source, or the same one of each layer, to Bifocal's.

    Args:
        pattern: name in the source without its prefix; `#` stands for the number of a layer.
        targets: Bifocal's names, with `#` in the same position. Several take equal parts of the tensor's rows.
        swap: whether the two halves of the tensor are in the opposite order.
    """

    pattern: str
    targets: tuple[str, ...]
    swap: bool = False

    def match(self, name: str) -> tuple[str, ...] | None:
        """Return Bifocal's names for one of the source's; None if the pattern does not match."""
        before, layered, after = self.pattern.partition("#")
        match = re.fullmatch(re.escape(before) + (r"(\d+)" if layered else "") + re.escape(after), name)
        if match is None:
            return None
        layer = match.group(1) if layered else ""
        return tuple(target.replace("#", layer, 1) for target in self.targets)

    def to_bifocal(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Return Bifocal's tensors for the source's."""
        if self.swap:
            first, second = tensor.chunk(2)
            tensor = torch.cat([second, first])
        return list(tensor.chunk(len(self.targets)))

    def to_source(self, tensors: list[torch.Tensor]) -> torch.Tensor:
        """Return the source's tensor for Bifocal's."""
        joined = torch.cat(tensors) if len(tensors) > 1 else tensors[0]
        if self.swap:
            first, second = joined.chunk(2)
            joined = torch.cat([second, first])
        return joined


@dataclass(frozen=True)
class WeightLayout:
    """One published way to name and arrange the weights of a tower.

    Args:
        name: name in messages.
        tower: "text" or "vision".
        marker: tensor that every checkpoint of this layout has, without its prefix.
        rules: mapping to Bifocal's names.
        ignored: patterns of tensors that carry no weights, each with the reason.
        rope_reference: side of the grid whose positions the rotary embedding counts in (vision).
        second_marker: another tensor that every checkpoint of this layout has, if the first is not enough.
    """

    name: str
    tower: str
    marker: str
    rules: tuple[Rule, ...]
    ignored: Mapping[str, str]
    rope_reference: int | None = None
    second_marker: str | None = None

    def prefix(self, names: list[str]) -> str | None:
        """Return the prefix of this layout's names among these; None if the layout is not present."""
        prefixes = sorted({name[: -len(self.marker)] for name in names if name.endswith(self.marker)}, key=len)
        if self.second_marker is not None:
            prefixes = [prefix for prefix in prefixes if f"{prefix}{self.second_marker}" in names]
        return next((prefix for prefix in prefixes if not prefix or prefix.endswith(".")), None)


TowerLayout = tuple[WeightLayout, str]  # with the prefix of its names


def _weight_and_bias(pattern: str, *targets: str) -> tuple[Rule, Rule]:
    return tuple(Rule(f"{pattern}.{kind}", tuple(f"{t}.{kind}" for t in targets)) for kind in ("weight", "bias"))  # type: ignore[return-value]


_EMBEDDED = (
    Rule("embeddings.word_embeddings.weight", ("embeddings.word_embeddings.weight",)),
    Rule("embeddings.token_type_embeddings.weight", ("embeddings.token_type_embeddings.weight",)),
)
_QKV = tuple(f"layers.#.attention.{name}_proj" for name in "qkv")

JINA_BERT = WeightLayout(
    name="JinaBERT v2",
    tower="text",
    marker="encoder.layer.0.attention.self.query.weight",
    rules=(
        *_EMBEDDED,
        *_weight_and_bias("embeddings.LayerNorm", "embeddings.norm"),
        *_weight_and_bias("encoder.layer.#.attention.self.query", _QKV[0]),
        *_weight_and_bias("encoder.layer.#.attention.self.key", _QKV[1]),
        *_weight_and_bias("encoder.layer.#.attention.self.value", _QKV[2]),
        *_weight_and_bias("encoder.layer.#.attention.output.dense", "layers.#.attention.out_proj"),
        *_weight_and_bias("encoder.layer.#.attention.output.LayerNorm", "layers.#.attention_norm"),
        Rule("encoder.layer.#.mlp.gated_layers.weight", ("layers.#.mlp.gate_up_proj.weight",)),
        *_weight_and_bias("encoder.layer.#.mlp.wo", "layers.#.mlp.down_proj"),
        *_weight_and_bias("encoder.layer.#.mlp.layernorm", "layers.#.mlp_norm"),
    ),
    ignored={
        r"pooler\.dense\.(weight|bias)": "the pooler of BERT, which mean pooling does not use",
        r"embeddings\.position_ids": "position numbers, not weights",
        r"encoder\.alibi": "computed from the configuration",
    },
)

JINA_BERT_FLASH = WeightLayout(
    name="JinaBERT v2, flash form",
    tower="text",
    marker="encoder.layers.0.mixer.Wqkv.weight",
    rules=(
        *_EMBEDDED,
        *_weight_and_bias("emb_ln", "embeddings.norm"),
        *_weight_and_bias("encoder.layers.#.mixer.Wqkv", *_QKV),
        *_weight_and_bias("encoder.layers.#.mixer.out_proj", "layers.#.attention.out_proj"),
        *_weight_and_bias("encoder.layers.#.norm1", "layers.#.attention_norm"),
        Rule("encoder.layers.#.mlp.gated_layers.weight", ("layers.#.mlp.gate_up_proj.weight",)),
        *_weight_and_bias("encoder.layers.#.mlp.wo", "layers.#.mlp.down_proj"),
        # The other spelling; there the second half is the gate (flash-attention's GatedMlp).
        Rule("encoder.layers.#.mlp.fc1.weight", ("layers.#.mlp.gate_up_proj.weight",), swap=True),
        *_weight_and_bias("encoder.layers.#.mlp.fc2", "layers.#.mlp.down_proj"),
        *_weight_and_bias("encoder.layers.#.norm2", "layers.#.mlp_norm"),
    ),
    ignored={r"pooler\.dense\.(weight|bias)": "the pooler of BERT, which mean pooling does not use"},
)

_XLM_R_QKV = tuple(f"layers.#.self_attn.{name}_proj" for name in "qkv")

# The targets are the names of transformers' own jina_embeddings_v3.
XLM_R_FLASH = WeightLayout(
    name="XLM-R with rotary positions, flash form",
    tower="text",
    marker="encoder.layers.0.mixer.Wqkv.weight",
    second_marker="encoder.layers.0.mlp.fc1.bias",  # the gated feed-forward of JinaBERT has none
    rules=(
        *_EMBEDDED,
        *_weight_and_bias("emb_ln", "embeddings.LayerNorm"),
        *_weight_and_bias("encoder.layers.#.mixer.Wqkv", *_XLM_R_QKV),
        *_weight_and_bias("encoder.layers.#.mixer.out_proj", "layers.#.self_attn.o_proj"),
        *_weight_and_bias("encoder.layers.#.norm1", "layers.#.post_attention_layernorm"),
        *_weight_and_bias("encoder.layers.#.mlp.fc1", "layers.#.mlp.fc1"),
        *_weight_and_bias("encoder.layers.#.mlp.fc2", "layers.#.mlp.fc2"),
        *_weight_and_bias("encoder.layers.#.norm2", "layers.#.post_mlp_layernorm"),
    ),
    ignored={r"pooler\.dense\.(weight|bias)": "the pooler of XLM-R, which mean pooling does not use"},
)

_PATCHES = (
    Rule("cls_token", ("embeddings.class_token",)),
    Rule("pos_embed", ("embeddings.position_embedding",)),
    *_weight_and_bias("patch_embed.proj", "embeddings.patch_embedding"),
    *_weight_and_bias("blocks.#.norm1", "layers.#.attention_norm"),
    *_weight_and_bias("blocks.#.norm2", "layers.#.mlp_norm"),
    *_weight_and_bias("blocks.#.attn.proj", "layers.#.attention.out_proj"),
    *_weight_and_bias("norm", "norm"),
)
_ROPE = {r"(blocks\.\d+\.attn\.)?rope\..*": "rotary tables, kept as numbers of the configuration"}

EVA = WeightLayout(
    name="EVA02, EVA-CLIP's form",
    tower="vision",
    marker="blocks.0.attn.inner_attn_ln.weight",
    rules=(
        *_PATCHES,
        *(Rule(f"blocks.#.attn.{name}_proj.weight", (f"layers.#.attention.{name}_proj.weight",)) for name in "qkv"),
        *(Rule(f"blocks.#.attn.{name}_bias", (f"layers.#.attention.{name}_proj.bias",)) for name in "qv"),
        *_weight_and_bias("blocks.#.attn.inner_attn_ln", "layers.#.attention.inner_norm"),
        *_weight_and_bias("blocks.#.mlp.w1", "layers.#.mlp.gate_proj"),
        *_weight_and_bias("blocks.#.mlp.w2", "layers.#.mlp.up_proj"),
        *_weight_and_bias("blocks.#.mlp.ffn_ln", "layers.#.mlp.inner_norm"),
        *_weight_and_bias("blocks.#.mlp.w3", "layers.#.mlp.down_proj"),
    ),
    ignored=_ROPE,
    rope_reference=16,
)

TIMM = WeightLayout(
    name="EVA02, timm's form",
    tower="vision",
    marker="blocks.0.mlp.fc1_g.weight",
    rules=(
        *_PATCHES,
        *(Rule(f"blocks.#.attn.{name}_proj.weight", (f"layers.#.attention.{name}_proj.weight",)) for name in "qkv"),
        *(Rule(f"blocks.#.attn.{name}_proj.bias", (f"layers.#.attention.{name}_proj.bias",)) for name in "qv"),
        *_weight_and_bias("blocks.#.attn.norm", "layers.#.attention.inner_norm"),
        *_weight_and_bias("blocks.#.mlp.fc1_g", "layers.#.mlp.gate_proj"),
        *_weight_and_bias("blocks.#.mlp.fc1_x", "layers.#.mlp.up_proj"),
        *_weight_and_bias("blocks.#.mlp.norm", "layers.#.mlp.inner_norm"),
        *_weight_and_bias("blocks.#.mlp.fc2", "layers.#.mlp.down_proj"),
    ),
    ignored=_ROPE,
    rope_reference=16,
)

LAYOUTS = (JINA_BERT, XLM_R_FLASH, JINA_BERT_FLASH, EVA, TIMM)  # the first that matches counts
# The linear head to the shared space is a weight of the joint model, not of the tower.
HEAD = _weight_and_bias("head", "vision_projection")
