"""The layouts in which weights of the two towers are published, as rules from their names to ours.

Facts: JinaBERT v2's names are those of BERT with a gated feed-forward (arXiv 2310.19923); its "flash" form, which
jina-clip-v1 holds, fuses query, key and value. EVA02's names are those of EVA-CLIP (arXiv 2303.15389), which
jina-clip-v1 and open_clip keep, and those of timm. The feed-forward of the flash form is known in two spellings, both
are accepted.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Rule:
    """
    Args:
        pattern: of names of the source, below its prefix; `#` is the number of a layer.
        targets: names of ours, `#` in the same place.
            Several take equal parts of the tensor's rows.
        swap: the tensor's two halves stand in the other order.
    """

    pattern: str
    targets: tuple[str, ...]
    swap: bool = False

    def match(self, name: str) -> tuple[str, ...] | None:
        """Our names for one of the source's; None if this is no such name."""
        before, layered, after = self.pattern.partition("#")
        found = re.fullmatch(re.escape(before) + (r"(\d+)" if layered else "") + re.escape(after), name)
        if found is None:
            return None
        layer = found.group(1) if layered else ""
        return tuple(target.replace("#", layer, 1) for target in self.targets)

    def forth(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Ours from the source's."""
        if self.swap:
            first, second = tensor.chunk(2)
            tensor = torch.cat([second, first])
        return list(tensor.chunk(len(self.targets)))

    def back(self, tensors: list[torch.Tensor]) -> torch.Tensor:
        """The source's from ours."""
        joined = torch.cat(tensors) if len(tensors) > 1 else tensors[0]
        if self.swap:
            first, second = joined.chunk(2)
            joined = torch.cat([second, first])
        return joined


@dataclass(frozen=True)
class Layout:
    """
    Args:
        name: for messages.
        tower: "text" or "vision".
        marks: a name that all checkpoints of this layout have, below their prefix.
        rules: from theirs to ours.
        dropped: patterns of names that carry nothing that we keep, each with its reason.
        rope_reference: the grid whose positions the rotary embedding counts in (vision).
    """

    name: str
    tower: str
    marks: str
    rules: tuple[Rule, ...]
    dropped: Mapping[str, str]
    rope_reference: int | None = None

    def prefix(self, names: list[str]) -> str | None:
        """What stands before this layout's names among these; None if it is not here."""
        found = sorted({name[: -len(self.marks)] for name in names if name.endswith(self.marks)}, key=len)
        return next((p for p in found if not p or p.endswith(".")), None)


def _both(pattern: str, *targets: str) -> tuple[Rule, Rule]:
    return tuple(Rule(f"{pattern}.{kind}", tuple(f"{t}.{kind}" for t in targets)) for kind in ("weight", "bias"))  # type: ignore[return-value]


_EMBEDDED = (
    Rule("embeddings.word_embeddings.weight", ("embeddings.word_embeddings.weight",)),
    Rule("embeddings.token_type_embeddings.weight", ("embeddings.token_type_embeddings.weight",)),
)
_QKV = tuple(f"layers.#.attention.{name}_proj" for name in "qkv")

JINA_BERT = Layout(
    name="JinaBERT v2",
    tower="text",
    marks="encoder.layer.0.attention.self.query.weight",
    rules=(
        *_EMBEDDED,
        *_both("embeddings.LayerNorm", "embeddings.norm"),
        *_both("encoder.layer.#.attention.self.query", _QKV[0]),
        *_both("encoder.layer.#.attention.self.key", _QKV[1]),
        *_both("encoder.layer.#.attention.self.value", _QKV[2]),
        *_both("encoder.layer.#.attention.output.dense", "layers.#.attention.out_proj"),
        *_both("encoder.layer.#.attention.output.LayerNorm", "layers.#.attention_norm"),
        Rule("encoder.layer.#.mlp.gated_layers.weight", ("layers.#.mlp.gate_up_proj.weight",)),
        *_both("encoder.layer.#.mlp.wo", "layers.#.mlp.down_proj"),
        *_both("encoder.layer.#.mlp.layernorm", "layers.#.mlp_norm"),
    ),
    dropped={
        r"pooler\.dense\.(weight|bias)": "the pooler of BERT, which mean pooling does not use",
        r"embeddings\.position_ids": "numbers, no weights",
        r"encoder\.alibi": "computed from the configuration",
    },
)

JINA_BERT_FLASH = Layout(
    name="JinaBERT v2, flash form",
    tower="text",
    marks="encoder.layers.0.mixer.Wqkv.weight",
    rules=(
        *_EMBEDDED,
        *_both("emb_ln", "embeddings.norm"),
        *_both("encoder.layers.#.mixer.Wqkv", *_QKV),
        *_both("encoder.layers.#.mixer.out_proj", "layers.#.attention.out_proj"),
        *_both("encoder.layers.#.norm1", "layers.#.attention_norm"),
        Rule("encoder.layers.#.mlp.gated_layers.weight", ("layers.#.mlp.gate_up_proj.weight",)),
        *_both("encoder.layers.#.mlp.wo", "layers.#.mlp.down_proj"),
        # The other spelling; there the second half is the gate (flash-attention's GatedMlp).
        Rule("encoder.layers.#.mlp.fc1.weight", ("layers.#.mlp.gate_up_proj.weight",), swap=True),
        *_both("encoder.layers.#.mlp.fc2", "layers.#.mlp.down_proj"),
        *_both("encoder.layers.#.norm2", "layers.#.mlp_norm"),
    ),
    dropped={r"pooler\.dense\.(weight|bias)": "the pooler of BERT, which mean pooling does not use"},
)

_PATCHES = (
    Rule("cls_token", ("embeddings.class_token",)),
    Rule("pos_embed", ("embeddings.position_embedding",)),
    *_both("patch_embed.proj", "embeddings.patch_embedding"),
    *_both("blocks.#.norm1", "layers.#.attention_norm"),
    *_both("blocks.#.norm2", "layers.#.mlp_norm"),
    *_both("blocks.#.attn.proj", "layers.#.attention.out_proj"),
    *_both("norm", "norm"),
)
_ROPE = {r"(blocks\.\d+\.attn\.)?rope\..*": "rotary tables, kept as numbers of the configuration"}

EVA = Layout(
    name="EVA02, EVA-CLIP's form",
    tower="vision",
    marks="blocks.0.attn.inner_attn_ln.weight",
    rules=(
        *_PATCHES,
        *(Rule(f"blocks.#.attn.{name}_proj.weight", (f"layers.#.attention.{name}_proj.weight",)) for name in "qkv"),
        *(Rule(f"blocks.#.attn.{name}_bias", (f"layers.#.attention.{name}_proj.bias",)) for name in "qv"),
        *_both("blocks.#.attn.inner_attn_ln", "layers.#.attention.inner_norm"),
        *_both("blocks.#.mlp.w1", "layers.#.mlp.gate_proj"),
        *_both("blocks.#.mlp.w2", "layers.#.mlp.up_proj"),
        *_both("blocks.#.mlp.ffn_ln", "layers.#.mlp.inner_norm"),
        *_both("blocks.#.mlp.w3", "layers.#.mlp.down_proj"),
    ),
    dropped=_ROPE,
    rope_reference=16,
)

TIMM = Layout(
    name="EVA02, timm's form",
    tower="vision",
    marks="blocks.0.mlp.fc1_g.weight",
    rules=(
        *_PATCHES,
        *(Rule(f"blocks.#.attn.{name}_proj.weight", (f"layers.#.attention.{name}_proj.weight",)) for name in "qkv"),
        *(Rule(f"blocks.#.attn.{name}_proj.bias", (f"layers.#.attention.{name}_proj.bias",)) for name in "qv"),
        *_both("blocks.#.attn.norm", "layers.#.attention.inner_norm"),
        *_both("blocks.#.mlp.fc1_g", "layers.#.mlp.gate_proj"),
        *_both("blocks.#.mlp.fc1_x", "layers.#.mlp.up_proj"),
        *_both("blocks.#.mlp.norm", "layers.#.mlp.inner_norm"),
        *_both("blocks.#.mlp.fc2", "layers.#.mlp.down_proj"),
    ),
    dropped=_ROPE,
    rope_reference=16,
)

LAYOUTS = (JINA_BERT, JINA_BERT_FLASH, EVA, TIMM)
# The linear head to the shared space is a weight of the joint model, not of the tower.
HEAD = _both("head", "vision_projection")
