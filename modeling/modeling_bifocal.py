# Copyright 2026 The Bifocal authors. Licensed under the Apache License, Version 2.0.
"""The joint model: both towers, their heads into the shared space, and the learned temperature."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput, can_return_tuple

from .configuration_bifocal import BifocalConfig, BifocalTextConfig, BifocalVisionConfig
from .encoding_bifocal import SOURCE_KEYS, EncodingMixin, folder_or_id
from .loading_bifocal import is_dual_encoder, join_towers, load_dual_encoder, read_config
from .modeling_bifocal_base import LOADING, BifocalPreTrainedModel
from .modeling_bifocal_text import BifocalTextModel
from .modeling_bifocal_vision import BifocalVisionModel
from .towers_bifocal import build_projection, build_tower, pooled, width_of


@dataclass
class BifocalOutput(ModelOutput):
    """The output of [`BifocalModel`].

    Args:
        loss: with `return_loss=True`, the InfoNCE loss of both directions, or SigLIP's for a model with a bias.
        logits_per_image: (images, texts), cosine similarity divided by the temperature, plus `logit_bias` if the model
            has one; None without texts or images.
        logits_per_text: (texts, images), its transpose.
        text_embeds: (texts, projection_dim), of length 1; None without texts.
        image_embeds: (images, projection_dim), of length 1; None without images.
        text_model_output, vision_model_output: outputs of the towers.
    """

    loss: torch.Tensor | None = None
    logits_per_image: torch.Tensor | None = None
    logits_per_text: torch.Tensor | None = None
    text_embeds: torch.Tensor | None = None
    image_embeds: torch.Tensor | None = None
    text_model_output: BaseModelOutputWithPooling | None = None
    vision_model_output: BaseModelOutputWithPooling | None = None

    def to_tuple(self) -> tuple[Any, ...]:
        return tuple(value.to_tuple() if isinstance(value, ModelOutput) else value for value in self.values())


class BifocalModel(EncodingMixin, BifocalPreTrainedModel):
    """A text and an image tower for text-text and text-image search (Jina CLIP, arXiv 2405.20204)."""

    config_class = BifocalConfig
    base_model_prefix = "bifocal"
    input_modalities = ["image", "text"]
    _no_split_modules = ["BifocalTextEmbeddings", "BifocalTextLayer", "BifocalVisionEmbeddings", "BifocalVisionLayer"]

    def __init__(self, config: BifocalConfig) -> None:
        super().__init__(config)
        text, vision = config.text_config, config.vision_config
        self.text_model: Any = (
            BifocalTextModel(text)
            if text.model_type == BifocalTextConfig.model_type
            else build_tower(text, config.text_pooling)
        )
        self.vision_model: Any = (
            BifocalVisionModel(vision)
            if vision.model_type == BifocalVisionConfig.model_type
            else build_tower(vision, config.vision_pooling)
        )
        dimensions = config.projection_dim
        self.text_projection = build_projection(config.text_projection, width_of(text), dimensions)
        self.vision_projection = build_projection(config.vision_projection, width_of(vision), dimensions)
        # One element instead of a scalar: FSDP does not shard scalars.
        self.logit_scale = nn.Parameter(torch.full((1,), float(config.logit_scale_init_value)))
        self.logit_bias: nn.Parameter | None = None
        if config.logit_bias_init_value is not None:
            self.logit_bias = nn.Parameter(torch.full((1,), float(config.logit_bias_init_value)))
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any) -> Any:
        """Load a Bifocal model, or a whole dual encoder of transformers (CLIP, SigLIP, ...) as one.

        The arguments are those of `PreTrainedModel.from_pretrained`. For another dual encoder, keys of
        [`BifocalConfig`] that do not change a shape, such as `prompts`, are allowed.

        Raises:
            OSError: if there is no such model.
            ValueError: if it is neither of them, or its family is not supported.
        """
        path = folder_or_id(pretrained_model_name_or_path)
        hub = {key: kwargs[key] for key in SOURCE_KEYS if key in kwargs}
        try:
            other = None if path is None or kwargs.get("config") is not None else read_config(path, **hub)
        except (OSError, ValueError):
            other = None  # super().from_pretrained raises a clear error
        if isinstance(other, BifocalConfig | None):
            return super().from_pretrained(path, *model_args, **kwargs)
        if not is_dual_encoder(other):
            raise ValueError(
                f"'{path}' is a {type(other).__name__.removesuffix('Config')}, which is not a dual encoder; join "
                "two towers with BifocalModel.from_towers(text=..., image=...)."
            )
        with LOADING:
            return load_dual_encoder(cls, path, hub, **{key: kwargs[key] for key in kwargs if key not in hub})

    @classmethod
    def from_towers(
        cls, text: Any, image: Any, *, dtype: Any = None, hub: dict[str, Any] | None = None, **settings: Any
    ) -> Any:
        """Return a model of two pretrained towers, with its processor.

        The heads into the shared space are new. By default, that space is the text tower's, which needs no head, so
        that text vectors stay what they were. For a text tower of a dual encoder, its own head is kept.

        Args:
            text: folder or Hub id of a text encoder (of transformers or sentence-transformers, whose pooling, longest
                text and prompts are taken over), of a dual encoder, or of a Bifocal model.
            image: folder or Hub id of an image encoder, of a dual encoder, or of a Bifocal model.
            dtype: type of the weights; that of the saved ones when None.
            hub: options of the Hub for both, such as `{"revision": ..., "token": ...}`.
            settings: keys of [`BifocalConfig`], such as `projection_dim`, `vision_projection` or `prompts`.

        Raises:
            OSError: if there is no such model.
            ValueError: if one is no encoder of that kind, lacks weights, or the settings do not fit.
        """
        with LOADING:
            return join_towers(cls, folder_or_id(text), folder_or_id(image), dict(hub or {}), dtype, **settings)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, BifocalModel):
            init.constant_(module.logit_scale, float(self.config.logit_scale_init_value))
            if module.logit_bias is not None:
                init.constant_(module.logit_bias, float(self.config.logit_bias_init_value))

    def get_input_embeddings(self) -> nn.Module:
        return self.text_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.text_model.set_input_embeddings(value)

    def get_logit_scale(self) -> torch.Tensor:
        """Return 1 / tau, the factor on image-text cosines: exp(logit_scale) in [1, exp(config.logit_scale_max)].

        Without a largest value, it is exp(logit_scale), as in SigLIP.
        """
        limit = self.config.logit_scale_max
        scale = self.logit_scale if limit is None else self.logit_scale.clamp(0.0, limit)
        return scale.exp().reshape(())

    @can_return_tuple
    def get_text_features(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Return the text tower's output with `pooler_output` (batch, projection_dim) in the shared space.

        `pooler_output` is not normalised. If `config.text_padding` is "max_length", texts are padded to
        `config.max_text_length` here. Texts must be padded at the end, as the processor does.

        Args:
            input_ids: (batch, length) token ids.
            attention_mask: (batch, length), 1 for a token and 0 for padding; no padding when None.
            token_type_ids: (batch, length); all 0 when None.
            inputs_embeds: (batch, length, width) word embeddings instead of `input_ids`.
            kwargs: other arguments of the text tower.

        Raises:
            ValueError: if a text is longer than `config.max_text_length`, or the text tower cannot take the arguments.
        """
        texts = input_ids if inputs_embeds is None else inputs_embeds
        if texts is not None and texts.shape[1] > self.config.max_text_length:
            raise ValueError(
                f"The text is {texts.shape[1]} tokens long, but this model takes at most {self.config.max_text_length} "
                "(config.max_text_length); truncate it."
            )
        if self.config.text_padding == "max_length":
            if input_ids is None:
                raise ValueError("This model pads token ids to its full length, so it takes no inputs_embeds.")
            input_ids, attention_mask = self._full_length(input_ids, attention_mask)
        inputs = {
            "input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids,
            "inputs_embeds": inputs_embeds,
        }  # fmt: skip
        inputs = {name: value for name, value in inputs.items() if value is not None}
        outputs = self.text_model(**inputs, **kwargs, return_dict=True)
        return _projected(outputs, pooled(outputs, attention_mask, self.config.text_pooling), self.text_projection)

    def _full_length(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return token ids and mask (batch, `config.max_text_length`), with the padding token after each text.

        The mask is None if the text tower is given none.
        """
        padding = self.config.text_pad_token_id
        if padding is None:
            padding = getattr(self.config.text_config, "pad_token_id", None) or 0
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        length = self.config.max_text_length
        rest = input_ids.new_full((1, length), padding).expand(input_ids.shape[0], -1)
        input_ids = torch.cat([torch.where(attention_mask != 0, input_ids, padding), rest], dim=1)[:, :length]
        if not self.config.text_attention_mask:
            return input_ids, None
        return input_ids, torch.cat([attention_mask, torch.zeros_like(rest)], dim=1)[:, :length]

    @can_return_tuple
    def get_image_features(
        self, pixel_values: torch.Tensor | None = None, pooled_only: bool = False, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """Return the image tower's output with `pooler_output` (batch, projection_dim) in the shared space.

        `pooler_output` is not normalised.

        Args:
            pixel_values: as the image tower takes them.
            pooled_only: whether only `pooler_output` is needed; see [`BifocalVisionModel`]. Other towers, and other
                poolings than its own, ignore it.
            kwargs: other arguments of the image tower.
        """
        by_class_token = self.config.vision_pooling in ("pooler", "class_token")
        if pooled_only and by_class_token and isinstance(self.vision_model, BifocalVisionModel):
            kwargs["pooled_only"] = True
        outputs = self.vision_model(pixel_values=pixel_values, **kwargs, return_dict=True)
        return _projected(outputs, pooled(outputs, None, self.config.vision_pooling), self.vision_projection)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        return_loss: bool | None = None,
        **kwargs: Any,
    ) -> BifocalOutput:
        """Embed texts, images or both.

        Args:
            input_ids, attention_mask, token_type_ids: (texts, length).
            pixel_values: (images, channels, height, width).
            return_loss: whether to return L_nce = L_i->t + L_t->i, the sum of both directions (arXiv 2405.20204,
                section 3.2; CLIP's loss is half of it), or SigLIP's loss (arXiv 2303.15343, equation 1) if the model
                has its bias. It needs as many texts as images.

        Raises:
            ValueError: if there are neither texts nor images, or a loss is requested for unequal numbers of them.
        """
        if input_ids is None and pixel_values is None:
            raise ValueError("BifocalModel needs input_ids, pixel_values or both.")
        text_output = vision_output = text_embeds = image_embeds = None
        if input_ids is not None:
            text_output = self.get_text_features(input_ids, attention_mask, token_type_ids, return_dict=True, **kwargs)
            text_embeds = nn.functional.normalize(text_output.pooler_output, dim=-1)
        if pixel_values is not None:
            vision_output = self.get_image_features(pixel_values, return_dict=True, **kwargs)
            image_embeds = nn.functional.normalize(vision_output.pooler_output, dim=-1)

        logits_per_text = logits_per_image = loss = None
        if text_embeds is not None and image_embeds is not None:
            dtype = torch.promote_types(text_embeds.dtype, image_embeds.dtype)  # towers may differ in precision
            logits_per_text = text_embeds.to(dtype) @ image_embeds.t().to(text_embeds.device, dtype)
            logits_per_text = logits_per_text * self.get_logit_scale().to(text_embeds.device)
            if self.logit_bias is not None:
                logits_per_text = logits_per_text + self.logit_bias.to(text_embeds.device)
            logits_per_image = logits_per_text.t()
        if return_loss:
            if logits_per_text is None or logits_per_text.shape[0] != logits_per_text.shape[1]:
                raise ValueError("return_loss=True needs as many texts as images, text i with image i.")
            loss = self._loss(logits_per_text.float())
        return BifocalOutput(
            loss=loss,
            logits_per_image=logits_per_image,
            logits_per_text=logits_per_text,
            text_embeds=text_embeds,
            image_embeds=image_embeds,
            text_model_output=text_output,
            vision_model_output=vision_output,
        )

    def _loss(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the loss of logits (texts, images), text i with image i."""
        targets = torch.arange(logits.shape[0], device=logits.device)
        if self.logit_bias is None:
            return nn.functional.cross_entropy(logits, targets) + nn.functional.cross_entropy(logits.t(), targets)
        signs = 2.0 * nn.functional.one_hot(targets) - 1.0
        return -nn.functional.logsigmoid(signs * logits).sum() / logits.shape[0]


def _projected(outputs: Any, state: torch.Tensor, projection: nn.Module) -> BaseModelOutputWithPooling:
    """Return a tower's outputs with its pooled state in the shared space, as a new object: hooks may hold the old."""
    weight = next(projection.parameters(), None)
    if (
        weight is not None
        and weight.is_floating_point()
        and (state.device.type == "meta" or not torch.is_autocast_enabled(state.device.type))
    ):
        state = state.to(weight.dtype)
    kept = {name: outputs.get(name) for name in ("last_hidden_state", "hidden_states", "attentions")}
    return BaseModelOutputWithPooling(pooler_output=projection(state), **kept)
