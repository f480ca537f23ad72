"""Model families that `bifocal convert` recognises but does not convert, so that its error can name them."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

JINA_EMBEDDINGS_V3 = "jina-embeddings-v3 alone; transformers loads jinaai/jina-embeddings-v3-hf itself"
# model_type of a configuration, or a pattern of tensor names without one, and the family; the first match counts.
_FAMILIES: tuple[tuple[tuple[str, ...], str, str], ...] = (
    (
        ("bifocal", "bifocal_text", "bifocal_vision"),
        r"(text_model\.|vision_model\.)?layers\.0\.mlp\.(gate_up_proj|gate_proj)\.weight",
        "a Bifocal model already; load it with AutoModel.from_pretrained(..., trust_remote_code=True)",
    ),
    (
        (),
        r"(.*\.)?roberta\..*parametrizations\..*|roberta\.encoder\.layers\.0\.mixer\..*",
        JINA_EMBEDDINGS_V3,
    ),
    (
        (),
        r"(.*\.)?encoder\.layer\.0\.(attention\.self\.layer_norm_[qk]|mlp\.up_gated_layer)\..*",
        "JinaBERT with norms on queries and keys (jina-embeddings-v2-code)",
    ),
    ((), r"(visual\.)?(conv1\.weight|transformer\.resblocks\.0\..*)", "CLIP in OpenAI's or open_clip's form"),
    (
        (),
        r"(bert\.)?embeddings\.position_embeddings\.weight",
        "BERT with a position table, which JinaBERT does not have",
    ),
    (
        (),
        r"(visual\.|vision_model\.)?blocks\.0\.(attn\.qkv\.weight|mlp\.fc1\.weight)",
        "a plain ViT or EVA-01, without EVA02's sub-LN and SwiGLU",
    ),
)


def family_of(names: Iterable[str], config: Mapping[str, Any] = {}) -> str | None:
    """Return the family of a source if it is known but not converted, otherwise None.

    Args:
        names: names of the source's tensors.
        config: content of its config.json.
    """
    tensors = list(names)
    kind = config.get("model_type")
    for types, pattern, family in _FAMILIES:
        if kind in types or any(re.fullmatch(pattern, name) for name in tensors):
            return family
    return None
