# Copyright 2026 The Bifocal authors. Licensed under the Apache License, Version 2.0.
"""Configurations of the text tower, the image tower and the joint model.

The defaults are the base size of Jina CLIP v1 (arXiv 2405.20204, section 3): a JinaBERT v2 base text tower
(arXiv 2310.19923) and an EVA02-B/16 image tower (arXiv 2303.11331) with a linear head into the shared space.
"""

import math
from typing import TYPE_CHECKING, Any

from transformers import CONFIG_MAPPING, AutoConfig
from transformers.configuration_utils import PreTrainedConfig

from .configuration_bifocal_base import (
    BifocalBaseConfig,
    is_saved,
    reading_saved,
    require_heads_divide_width,
    require_positive_ints,
    require_probabilities,
)
from .towers_bifocal import PADDINGS, POOLINGS, PROJECTIONS, longest_text, text_family, width_of
from .towers_bifocal import vision_pooling as family_vision_pooling

if TYPE_CHECKING:
    # transformers distinguishes local folders with the same name by the files that this one imports. With this import,
    # that is all files. Without it, a second folder with another model but the same configuration would run the first
    # one's code.
    from .modeling_bifocal import BifocalModel  # noqa: F401


class BifocalTextConfig(BifocalBaseConfig):
    """Configuration of [`BifocalTextModel`], a BERT with symmetric ALiBi and a GEGLU feed-forward.

    Args:
        vocab_size: rows of the word embedding; 30,522 WordPieces padded to a multiple of 64.
        hidden_size: width of the tower, a multiple of num_attention_heads.
        num_hidden_layers: number of layers.
        num_attention_heads: attention heads of each layer.
        intermediate_size: width between the two matrices of the feed-forward.
        hidden_act: activation of the gate, a name of `transformers.activations.ACT2FN`.
        hidden_dropout_prob, attention_probs_dropout_prob: dropout in training.
        max_position_embeddings: longest input in tokens, special tokens included. ALiBi has no table, so this is a
            limit and not a shape: 512 in training, 8,192 in use.
        type_vocab_size: rows of the token-type embedding.
        initializer_range: standard deviation of new weights.
        layer_norm_eps: epsilon of every LayerNorm.
        pad_token_id: id of the padding token.
        tie_word_embeddings: whether the masked-language-modelling head shares the word embedding.
    """

    model_type = "bifocal_text"
    base_config_key = "text_config"
    auto_models = {"AutoModel": "modeling_bifocal_text.BifocalTextModel"}

    def __init__(
        self,
        vocab_size: int = 30528,
        hidden_size: int = 768,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        intermediate_size: int = 3072,
        hidden_act: str = "gelu",
        hidden_dropout_prob: float = 0.1,
        attention_probs_dropout_prob: float = 0.0,
        max_position_embeddings: int = 8192,
        type_vocab_size: int = 2,
        initializer_range: float = 0.02,
        layer_norm_eps: float = 1e-12,
        pad_token_id: int = 0,
        tie_word_embeddings: bool = True,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = intermediate_size
        self.hidden_act = hidden_act
        self.hidden_dropout_prob = hidden_dropout_prob
        self.attention_probs_dropout_prob = attention_probs_dropout_prob
        self.max_position_embeddings = max_position_embeddings
        self.type_vocab_size = type_vocab_size
        self.initializer_range = initializer_range
        self.layer_norm_eps = layer_norm_eps
        self.pad_token_id = pad_token_id
        self.tie_word_embeddings = tie_word_embeddings
        super().__init__(**kwargs)

        require_positive_ints(
            self, "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
            "max_position_embeddings", "type_vocab_size",
        )  # fmt: skip
        require_probabilities(self, "hidden_dropout_prob", "attention_probs_dropout_prob")
        require_heads_divide_width(self)

    __eq__ = PreTrainedConfig.__eq__


class BifocalVisionConfig(BifocalBaseConfig):
    """Configuration of [`BifocalVisionModel`], an EVA02 vision transformer with sub-LN and 2D rotary embedding.

    Args:
        hidden_size: width of the tower. The width of a head is a multiple of four: one half is rotated by the row, the
            other by the column, both in pairs.
        num_hidden_layers: number of layers.
        num_attention_heads: attention heads of each layer.
        intermediate_size: width of the SwiGLU feed-forward.
        hidden_act: activation of the gate.
        num_channels: channels of an image.
        image_size: side in pixels of the images the tower is trained on. The last pixels that do not fill a patch are
            ignored: 512 with patches of 14 are 36 x 36 patches.
        patch_size: side of a patch in pixels.
        hidden_dropout_prob, attention_probs_dropout_prob: dropout in training.
        patch_dropout: share of each image's patches that are dropped in training (arXiv 2212.00794).
        rope_theta: base of the rotary frequencies.
        rope_reference_grid: side in patches of the grid that rotary positions are scaled to: position i of a grid of g
            becomes i / g * reference. 14 for jina-clip-v1, 16 for EVA02-CLIP; None does not scale.
        initializer_range: standard deviation of new weights.
        layer_norm_eps: epsilon of every LayerNorm.
    """

    model_type = "bifocal_vision"
    base_config_key = "vision_config"
    auto_models = {"AutoModel": "modeling_bifocal_vision.BifocalVisionModel"}

    def __init__(
        self,
        hidden_size: int = 768,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        intermediate_size: int = 2048,
        hidden_act: str = "silu",
        num_channels: int = 3,
        image_size: int = 224,
        patch_size: int = 16,
        hidden_dropout_prob: float = 0.0,
        attention_probs_dropout_prob: float = 0.0,
        patch_dropout: float = 0.1,
        rope_theta: float = 10000.0,
        rope_reference_grid: int | None = 14,
        initializer_range: float = 0.02,
        layer_norm_eps: float = 1e-6,
        **kwargs: Any,
    ) -> None:
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = intermediate_size
        self.hidden_act = hidden_act
        self.num_channels = num_channels
        self.image_size = image_size
        self.patch_size = patch_size
        self.hidden_dropout_prob = hidden_dropout_prob
        self.attention_probs_dropout_prob = attention_probs_dropout_prob
        self.patch_dropout = patch_dropout
        self.rope_theta = rope_theta
        self.rope_reference_grid = rope_reference_grid
        self.initializer_range = initializer_range
        self.layer_norm_eps = layer_norm_eps
        super().__init__(**kwargs)

        require_positive_ints(
            self, "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "num_channels",
            "image_size", "patch_size",
        )  # fmt: skip
        if rope_reference_grid is not None:
            require_positive_ints(self, "rope_reference_grid")
        require_probabilities(self, "hidden_dropout_prob", "attention_probs_dropout_prob", "patch_dropout")
        require_heads_divide_width(self)
        if (hidden_size // num_attention_heads) % 4:
            raise ValueError(
                f"BifocalVisionConfig needs a head width that is a multiple of 4 for the 2D rotary embedding, but "
                f"hidden_size {hidden_size} over {num_attention_heads} heads gives "
                f"{hidden_size // num_attention_heads}."
            )
        if image_size < patch_size:
            raise ValueError(
                f"BifocalVisionConfig.image_size ({image_size}) must be at least patch_size ({patch_size}); change one "
                "of them."
            )

    __eq__ = PreTrainedConfig.__eq__


class BifocalConfig(BifocalBaseConfig):
    """Configuration of [`BifocalModel`]: both towers and the shared space.

    A tower is one of Bifocal's or of any family of transformers. What differs between families (pooling, padding, ...)
    has a default for each `model_type`.

    Args:
        text_config, vision_config: configuration of a tower, or a dict of its keys with its `model_type` (Bifocal's
            tower without one); the base size when None.
        projection_dim: width of the shared space.
        text_projection, vision_projection: head that maps the tower's output into the shared space: "linear" (or True)
            with bias, "linear_without_bias", "mlp" (two linear layers with GELU), or False for none. Without it, the
            tower's width must be `projection_dim`. The base model has one for images only.
        logit_scale_init_value: initial ln(1/tau) of the image-text temperature; 2.6592 is tau = 0.07.
        logit_scale_max: largest value of ln(1/tau); ln 100 as in CLIP. None for no limit, as in SigLIP.
        logit_bias_init_value: initial learned bias of SigLIP's loss (arXiv 2303.15343), usually -10; None for a model
            without one, like Jina CLIP.
        initializer_range: standard deviation of new projection weights.
        text_pooling, vision_pooling: state of a tower that represents its input: "mean" (over the tokens that are not
            padding), "class_token" (the first), "last_token", or "pooler", the tower's own `pooler_output`. The
            family's when None.
        text_padding: "longest", or "max_length" for a text tower that was trained on texts padded to full length, as
            SigLIP's: the model then pads every text to `max_text_length`. The family's when None.
        text_attention_mask: whether the text tower is given the attention mask; the family's when None.
        text_pad_token_id: padding token of the tokenizer, where the text tower's configuration has another one.
        max_text_length: longest text in tokens, special tokens included; the text tower's when None.
        prompts: texts that go before a text, by name, such as {"query": "query: ", "document": "passage: "}; the
            family's when None.
        matryoshka_dimensions: numbers of leading dimensions that the model was trained to be truncated to
            (arXiv 2205.13147); None if it was not.
    """

    model_type = "bifocal"
    auto_models = {
        "AutoModel": "modeling_bifocal.BifocalModel",
        "AutoModelForZeroShotImageClassification": "modeling_bifocal.BifocalModel",
    }
    sub_configs = {"text_config": AutoConfig, "vision_config": AutoConfig}
    own_towers = {"text_config": BifocalTextConfig, "vision_config": BifocalVisionConfig}
    sub_configs_defaults = dict(own_towers)  # later transformers 5 releases read this one

    def __init__(
        self,
        text_config: PreTrainedConfig | dict[str, Any] | None = None,
        vision_config: PreTrainedConfig | dict[str, Any] | None = None,
        projection_dim: int = 768,
        text_projection: bool | str = False,
        vision_projection: bool | str = True,
        logit_scale_init_value: float = 2.6592,
        logit_scale_max: float | None = math.log(100.0),
        logit_bias_init_value: float | None = None,
        initializer_range: float = 0.02,
        text_pooling: str | None = None,
        vision_pooling: str | None = None,
        text_padding: str | None = None,
        text_attention_mask: bool | None = None,
        text_pad_token_id: int | None = None,
        max_text_length: int | None = None,
        prompts: dict[str, str] | None = None,
        matryoshka_dimensions: list[int] | None = None,
        **kwargs: Any,
    ) -> None:
        with reading_saved(is_saved(kwargs)):  # a tower's dict was saved with the dict that contains it
            self.text_config = _as_config(text_config, BifocalTextConfig)
            self.vision_config = _as_config(vision_config, BifocalVisionConfig)
        family = text_family(self.text_config)
        self.projection_dim = projection_dim
        self.text_projection = text_projection
        self.vision_projection = vision_projection
        self.logit_scale_init_value = logit_scale_init_value
        self.logit_scale_max = logit_scale_max
        self.logit_bias_init_value = logit_bias_init_value
        self.initializer_range = initializer_range
        self.text_pooling = text_pooling or family.pooling
        self.vision_pooling = vision_pooling or family_vision_pooling(self.vision_config)
        self.text_padding = text_padding or family.padding
        self.text_attention_mask = family.attention_mask if text_attention_mask is None else text_attention_mask
        self.text_pad_token_id = text_pad_token_id
        self.max_text_length = max_text_length
        if not isinstance(prompts, dict | None):
            raise ValueError(f"BifocalConfig.prompts must be texts by name, but it is {prompts!r}.")
        self.prompts = dict(family.prompts if prompts is None else prompts)
        self.matryoshka_dimensions = matryoshka_dimensions
        super().__init__(**kwargs)

        require_positive_ints(self, "projection_dim", "max_text_length")
        for name in ("logit_scale_init_value", "logit_scale_max", "logit_bias_init_value", "initializer_range"):
            if not isinstance(getattr(self, name), int | float | None):
                raise ValueError(f"BifocalConfig.{name} must be a number, but it is {getattr(self, name)!r}.")
        self._require_choices()
        for tower in ("text", "vision"):
            width = width_of(getattr(self, f"{tower}_config"))
            if not getattr(self, f"{tower}_projection") and width != projection_dim:
                raise ValueError(
                    f"BifocalConfig: without {tower}_projection the {tower} tower's hidden_size ({width}) must equal "
                    f"projection_dim ({projection_dim}); set {tower}_projection=True or change one of them."
                )

    @property
    def max_text_length(self) -> int:
        """Longest text in tokens, special tokens included: the own value, or as many as the text tower takes."""
        return self._max_text_length or longest_text(self.text_config)

    @max_text_length.setter
    def max_text_length(self, value: int | None) -> None:
        self._max_text_length = value

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as a dict; `max_text_length` is in it only if it is not the text tower's."""
        values = super().to_dict()
        length = values.pop("_max_text_length", None)
        return values if length is None else values | {"max_text_length": length}

    def _require_choices(self) -> None:
        """Check the values that are one of a few.

        Raises:
            ValueError: if a value is not allowed.
        """
        for name, allowed in (
            ("text_projection", (False, True, *PROJECTIONS)),
            ("vision_projection", (False, True, *PROJECTIONS)),
            ("text_pooling", POOLINGS),
            ("vision_pooling", POOLINGS),
            ("text_padding", PADDINGS),
            ("text_attention_mask", (False, True)),
        ):
            value: Any = getattr(self, name)
            if not any(value is one or (isinstance(value, str) and value == one) for one in allowed):
                raise ValueError(f"BifocalConfig.{name} must be {_listed(allowed)}, but it is {value!r}.")
        if self.text_padding == "longest" and not self.text_attention_mask:
            raise ValueError(
                "BifocalConfig.text_attention_mask=False needs text_padding='max_length': without a mask, a text's "
                "vector would depend on the longest text of its batch."
            )
        limit = longest_text(self.text_config)
        if self.max_text_length > limit:
            raise ValueError(
                f"BifocalConfig.max_text_length is {self.max_text_length}, but the text tower takes at most {limit} "
                "tokens."
            )
        dimensions = [] if self.matryoshka_dimensions is None else self.matryoshka_dimensions
        if not isinstance(dimensions, list | tuple) or not all(
            isinstance(one, int) and 1 <= one <= self.projection_dim for one in dimensions
        ):
            raise ValueError(
                f"BifocalConfig.matryoshka_dimensions must be a list of numbers from 1 to projection_dim "
                f"({self.projection_dim}), but it is {dimensions!r}."
            )
        if not all(isinstance(text, str) for pair in self.prompts.items() for text in pair):
            raise ValueError(f"BifocalConfig.prompts must be texts by name, but it is {self.prompts!r}.")
        rows = getattr(self.text_config, "vocab_size", None)
        if self.text_pad_token_id is not None and rows and not 0 <= self.text_pad_token_id < rows:
            raise ValueError(
                f"BifocalConfig.text_pad_token_id is {self.text_pad_token_id}, but the text tower has {rows} tokens."
            )

    __eq__ = PreTrainedConfig.__eq__


def _listed(values: tuple) -> str:
    *most, last = map(repr, values)
    return f"{', '.join(most)} or {last}"


def _as_config(config: Any, default: type[PreTrainedConfig]) -> Any:
    """Return the configuration of a tower.

    Args:
        config: a configuration, a dict of its keys, or None.
        default: its class unless the dict has another `model_type`.

    Raises:
        ValueError: if it has another type, an unknown `model_type`, or is the configuration of a whole dual encoder.
    """
    if config is None:
        return default()
    name = default.base_config_key
    if isinstance(config, dict):
        kind = config.get("model_type", default.model_type)
        if kind == default.model_type:
            return default(**config)
        if kind not in CONFIG_MAPPING:
            raise ValueError(f"{name} has the model_type '{kind}', which this version of transformers does not know.")
        config = CONFIG_MAPPING[kind].from_dict(config)
    if not isinstance(config, PreTrainedConfig):
        raise ValueError(f"{name} must be a {default.__name__}, another configuration or a dict, not {type(config)}.")
    if hasattr(config, "text_config") and hasattr(config, "vision_config"):
        raise ValueError(
            f"{name} is a {type(config).__name__}, which has both towers; give its {name}, or load the whole model "
            "with BifocalModel.from_pretrained."
        )
    return config
