# Copyright 2026 The Bifocal authors. Licensed under the Apache License, Version 2.0.
"""The joint model: both towers, their heads into the shared space, and the learned temperature."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput, can_return_tuple

from .configuration_bifocal import BifocalConfig
from .encoding_bifocal import EncodingMixin
from .modeling_bifocal_base import BifocalPreTrainedModel
from .modeling_bifocal_text import BifocalTextModel
from .modeling_bifocal_vision import BifocalVisionModel


@dataclass
class BifocalOutput(ModelOutput):
    """The output of [`BifocalModel`].

    Args:
        loss: InfoNCE loss of both directions, with `return_loss=True`.
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
        self.text_model = BifocalTextModel(config.text_config)
        self.vision_model = BifocalVisionModel(config.vision_config)
        self.text_projection: nn.Module = nn.Identity()
        self.vision_projection: nn.Module = nn.Identity()
        if config.text_projection:
            self.text_projection = nn.Linear(config.text_config.hidden_size, config.projection_dim)
        if config.vision_projection:
            self.vision_projection = nn.Linear(config.vision_config.hidden_size, config.projection_dim)
        # One element instead of a scalar: FSDP does not shard scalars.
        self.logit_scale = nn.Parameter(torch.full((1,), float(config.logit_scale_init_value)))
        self.logit_bias: nn.Parameter | None = None
        if config.logit_bias_init_value is not None:
            self.logit_bias = nn.Parameter(torch.full((1,), float(config.logit_bias_init_value)))
        self.post_init()

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
        """Return 1 / tau, the factor on image-text cosines: exp(logit_scale) in [1, exp(config.logit_scale_max)]."""
        return self.logit_scale.clamp(0.0, self.config.logit_scale_max).exp().reshape(())

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

        `pooler_output` is not normalised. The arguments are those of [`BifocalTextModel`].
        """
        outputs = self.text_model(input_ids, attention_mask, token_type_ids, inputs_embeds, return_dict=True, **kwargs)
        return _projected(outputs, self.text_projection)

    @can_return_tuple
    def get_image_features(self, pixel_values: torch.Tensor | None = None, **kwargs: Any) -> BaseModelOutputWithPooling:
        """Return the image tower's output with `pooler_output` (batch, projection_dim) in the shared space.

        `pooler_output` is not normalised. The arguments are those of [`BifocalVisionModel`].
        """
        outputs = self.vision_model(pixel_values, return_dict=True, **kwargs)
        return _projected(outputs, self.vision_projection)

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
                section 3.2; CLIP's loss is half of it). It needs as many texts as images.

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
            targets = torch.arange(logits_per_text.shape[0], device=logits_per_text.device)
            loss = nn.functional.cross_entropy(logits_per_text.float(), targets) + nn.functional.cross_entropy(
                logits_per_text.t().float(), targets
            )
        return BifocalOutput(
            loss=loss,
            logits_per_image=logits_per_image,
            logits_per_text=logits_per_text,
            text_embeds=text_embeds,
            image_embeds=image_embeds,
            text_model_output=text_output,
            vision_model_output=vision_output,
        )


def _projected(outputs: BaseModelOutputWithPooling, projection: nn.Module) -> BaseModelOutputWithPooling:
    """Return a tower's outputs with its pooled state in the shared space, as a new object: hooks may hold the old."""
    pooled: Any = outputs.pooler_output
    weight = getattr(projection, "weight", None)
    if (
        isinstance(weight, torch.Tensor)
        and weight.is_floating_point()
        and (pooled.device.type == "meta" or not torch.is_autocast_enabled(pooled.device.type))
    ):
        pooled = pooled.to(weight.dtype)
    return type(outputs)(**{**outputs, "pooler_output": projection(pooled)})
