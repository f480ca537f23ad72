"""What a card says about the towers of a model, whatever their families."""

from typing import Any

from PIL import Image
from transformers import CONFIG_MAPPING

from bifocal.modeling import BifocalTextConfig, BifocalVisionConfig

_NAMES = {
    "bifocal_text": "JinaBERT with symmetric ALiBi (arXiv 2310.19923)",
    "bifocal_vision": "EVA02 (arXiv 2303.11331)",
    "jina_embeddings_v3": "XLM-R with rotary positions (arXiv 2409.10173)",
}
_POOLINGS = {
    "mean": "the mean of its tokens",
    "class_token": "its first token",
    "last_token": "its last token",
    "pooler": "its own pooled output",
}
_HEADS = {
    False: "no projection",
    True: "a linear projection",
    "linear": "a linear projection",
    "linear_without_bias": "a linear projection without bias",
    "mlp": "an MLP of two layers",
}


def tower_facts(model: Any) -> dict[str, dict[str, Any]]:
    """Return the facts of a model's text and image tower for its card, by "text" and "image".

    Those are family, layers, width, heads, parameters (with the head into the shared space), pooling and projection.
    """
    config = model.config
    return {
        "text": _facts(config.text_config, model.text_model, model.text_projection)
        | {"pooling": _POOLINGS[config.text_pooling], "projection": _HEADS[config.text_projection]},
        "image": _facts(config.vision_config, model.vision_model, model.vision_projection)
        | {"pooling": _POOLINGS[config.vision_pooling], "projection": _HEADS[config.vision_projection]},
    }


def _facts(config: Any, tower: Any, head: Any) -> dict[str, Any]:
    return {
        "family": family_name(config.model_type),
        "own": config.model_type in (BifocalTextConfig.model_type, BifocalVisionConfig.model_type),
        "layers": getattr(config, "num_hidden_layers", None),
        "width": getattr(config, "hidden_size", None),
        "heads": getattr(config, "num_attention_heads", None),
        "parameters": sum(parameter.numel() for module in (tower, head) for parameter in module.parameters()),
    }


def family_name(model_type: str) -> str:
    """Return the name of a family as its configuration's class spells it, such as "ModernBert" or "SiglipText"."""
    if model_type in _NAMES:
        return _NAMES[model_type]
    return CONFIG_MAPPING[model_type].__name__.removesuffix("Config") if model_type in CONFIG_MAPPING else model_type


def image_size(processor: Any) -> tuple[int, int]:
    """Return the height and width in pixels of the images that an image processor prepares.

    A configuration may name another size: DINOv2's says 518, but its processor crops to 224.
    """
    pixels = processor(Image.new("RGB", (64, 48)), return_tensors="np")["pixel_values"]
    return int(pixels.shape[-2]), int(pixels.shape[-1])


def keeps_shape(processor: Any) -> bool:
    """Return whether an image processor gives images of different shapes for images of different shapes."""
    shapes = [
        processor(Image.new("RGB", size), return_tensors="np")["pixel_values"].shape for size in ((64, 48), (48, 64))
    ]
    return bool(shapes[0] != shapes[1])


def ignores_case(tokenizer: Any) -> bool:
    """Return whether upper and lower case are the same to a tokenizer."""
    return tokenizer("A RED CIRCLE")["input_ids"] == tokenizer("a red circle")["input_ids"]
