# Copyright 2026 The Bifocal authors. Licensed under the Apache License, Version 2.0.
"""The image tower: EVA02 as in EVA-CLIP (arXiv 2303.11331, 2303.15389).

A pre-norm vision transformer with sub-LN (a LayerNorm on the attention output and one inside the SwiGLU feed-forward),
an absolute position embedding, and a 2D rotary embedding on the patch tokens' queries and keys.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import can_return_tuple

from .configuration_bifocal import BifocalVisionConfig
from .modeling_bifocal_base import (
    BifocalPreTrainedModel,
    eager_attention_forward,
    has_hooks,
    run_layers,
    split_heads,
    usable_implementation,
)
from .packing_bifocal import CPU_TOKENS


def compute_rotary_embedding(
    config: BifocalVisionConfig, rows: int, columns: int, device: torch.device | None = None
) -> torch.Tensor:
    """Return the 2D rotary embedding (cosines and sines) of the class token and a grid of patches, in float32.

    A head of width d has d / 4 frequencies theta^(-4k/d), each for an interleaved pair of channels. The first half of
    the pairs is rotated by the patch's row, the second by its column; the class token is not rotated.

    Returns:
        (1 + rows * columns, d / 2, 2), the class token first: cosine and sine for each pair of channels.
    """
    head_dim = config.hidden_size // config.num_attention_heads
    exponents = torch.arange(0, head_dim // 2, 2, dtype=torch.float32, device=device) / (head_dim // 2)
    frequencies = config.rope_theta**-exponents

    def angles(count: int) -> torch.Tensor:
        positions = torch.arange(count, dtype=torch.float32, device=device)
        if config.rope_reference_grid is not None:
            positions = positions / count * config.rope_reference_grid
        return torch.outer(positions, frequencies)

    by_row = angles(rows)[:, None, :].expand(rows, columns, -1)
    by_column = angles(columns)[None, :, :].expand(rows, columns, -1)
    patches = torch.cat([by_row, by_column], dim=-1).flatten(0, 1)
    table = torch.cat([torch.zeros_like(patches[:1]), patches])
    return torch.stack([table.cos(), table.sin()], dim=-1)


def apply_rotary_pos_emb(states: torch.Tensor, rotary: torch.Tensor) -> torch.Tensor:
    """Rotate each interleaved pair (x0, x1) by its angle: (x0 cos - x1 sin, x1 cos + x0 sin).

    Args:
        states: (..., tokens, d).
        rotary: (..., tokens, d / 2, 2) in float32, as from `compute_rotary_embedding`.

    Returns:
        The rotated states, those of 16 bits perhaps in float32.
    """
    supported = states.dtype != torch.float64 and states.device.type in ("cpu", "cuda")
    if supported and not torch.compiler.is_compiling():
        # A product of complex numbers, one kernel, takes a tenth of the time, but compilers and ONNX do not support it.
        # torch has no complex bfloat16. Converting the states costs little next to the matrix products below.
        pairs = states.float().unflatten(-1, (-1, 2))
        rotated = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(rotary.float())).flatten(-2)
        return rotated.to(states.dtype)
    pairs = states.unflatten(-1, (-1, 2))
    cos, sin = rotary.unbind(-1)
    first, second = pairs.unbind(-1)
    return torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-1).flatten(-2)


class BifocalVisionEmbeddings(nn.Module):
    """Patch embedding, class token and absolute position embedding; in training, some patches are dropped."""

    def __init__(self, config: BifocalVisionConfig) -> None:
        super().__init__()
        self.config = config
        self.grid = config.image_size // config.patch_size
        self.patch_embedding: nn.Module = nn.Conv2d(
            config.num_channels, config.hidden_size, kernel_size=config.patch_size, stride=config.patch_size
        )
        self.class_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.position_embedding = nn.Parameter(torch.zeros(1, 1 + self.grid**2, config.hidden_size))
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def positions(self, rows: int, columns: int) -> torch.Tensor:
        """Return the position embedding of a grid; other grids than the trained one are interpolated bicubically."""
        if rows == self.grid and columns == self.grid:
            return self.position_embedding
        classes, patches = self.position_embedding[:, :1], self.position_embedding[:, 1:]
        trained = patches.unflatten(1, (self.grid, self.grid)).permute(0, 3, 1, 2).float()
        resized = nn.functional.interpolate(trained, size=(rows, columns), mode="bicubic", align_corners=False)
        return torch.cat([classes, resized.flatten(2).transpose(1, 2).to(classes.dtype)], dim=1)

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        patch = self.config.patch_size
        if pixel_values.dim() != 4 or pixel_values.shape[1] != self.config.num_channels:
            raise ValueError(
                f"The image tower needs pixel_values of shape (batch, {self.config.num_channels}, height, width), "
                f"not {tuple(pixel_values.shape)}."
            )
        if min(pixel_values.shape[2:]) < patch:
            raise ValueError(
                f"The image tower needs images of at least one patch, {patch} x {patch} pixels, not "
                f"{pixel_values.shape[2]} x {pixel_values.shape[3]}; resize the images."
            )
        # The convolution ignores the last rows and columns that do not fill a patch.
        features = self.patch_embedding(pixel_values.to(self.class_token.dtype))
        rows, columns = features.shape[2:]
        tokens = features.flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_token.expand(tokens.shape[0], -1, -1), tokens], dim=1)
        tokens = self.dropout(tokens + self.positions(rows, columns))

        rotary = compute_rotary_embedding(self.config, rows, columns, tokens.device)
        if self.training and self.config.patch_dropout > 0:
            kept = self._kept(tokens)
            tokens = torch.gather(tokens, 1, kept.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))
            rotary = rotary[kept].unsqueeze(1)  # each patch has its own angles
        return tokens, rotary

    def _kept(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the indices (batch, kept) of the tokens to keep: the class token and random patches of each image."""
        batch, length = tokens.shape[:2]
        count = max(1, int((length - 1) * (1.0 - self.config.patch_dropout)))
        patches = 1 + torch.rand(batch, length - 1, device=tokens.device).topk(count, dim=1).indices
        return torch.cat([torch.zeros_like(patches[:, :1]), patches], dim=1)


class BifocalVisionAttention(nn.Module):
    """Rotary attention with a bias on q and v but not on k, and a LayerNorm before the output projection (sub-LN)."""

    def __init__(self, config: BifocalVisionConfig) -> None:
        super().__init__()
        self.config = config
        self.is_causal = False
        self.scaling = (config.hidden_size // config.num_attention_heads) ** -0.5
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.inner_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self, hidden_states: torch.Tensor, rotary: torch.Tensor, num_queries: int | None = None, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        heads = self.config.num_attention_heads
        queries = hidden_states[:, :num_queries]
        query = apply_rotary_pos_emb(split_heads(self.q_proj(queries), heads), rotary[..., :num_queries, :, :])
        key = apply_rotary_pos_emb(split_heads(self.k_proj(hidden_states), heads), rotary)
        value = split_heads(self.v_proj(hidden_states), heads)

        implementation = usable_implementation(self.config._attn_implementation, query.device)
        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        output, weights = attention(
            self,
            query.to(value.dtype),
            key.to(value.dtype),
            value,
            attention_mask=None,
            scaling=self.scaling,
            dropout=self.config.attention_probs_dropout_prob if self.training else 0.0,
            **kwargs,
        )
        return self.out_proj(self.inner_norm(output.flatten(2))), weights


class BifocalVisionMLP(nn.Module):
    """SwiGLU (arXiv 2002.05202) with sub-LN: W3 LayerNorm(silu(W1 x) * W2 x); all matrices have a bias."""

    def __init__(self, config: BifocalVisionConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = ACT2FN[config.hidden_act]
        self.inner_norm = nn.LayerNorm(config.intermediate_size, eps=config.layer_norm_eps)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        gated = self.activation(self.gate_proj(hidden_states)) * self.up_proj(hidden_states)
        return self.down_proj(self.inner_norm(gated))


class BifocalVisionLayer(GradientCheckpointingLayer):
    """LayerNorm before attention and before the feed-forward, residuals around both (pre-norm).

    With `num_queries`, only the states of the first tokens are computed and returned; they attend to all tokens.
    """

    def __init__(self, config: BifocalVisionConfig, depth: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = BifocalVisionAttention(config)
        self.mlp_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = BifocalVisionMLP(config)
        # Read by `_init_weights`; transformers does not pass it modules of remote code without own parameters.
        for matrix in (self.attention.out_proj, self.mlp.down_proj):
            matrix.depth = depth  # type: ignore[assignment]
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self, hidden_states: torch.Tensor, rotary: torch.Tensor, num_queries: int | None = None, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        attended, weights = self.attention(self.attention_norm(hidden_states), rotary, num_queries, **kwargs)
        hidden_states = hidden_states[:, :num_queries] + self.dropout(attended)
        return hidden_states + self.dropout(self.mlp(self.mlp_norm(hidden_states))), weights


class BifocalVisionModel(BifocalPreTrainedModel):
    """The image tower: pixels to patch states and the class token's state.

    It can be loaded from a folder of the joint model; the other weights are ignored.
    """

    config_class = BifocalVisionConfig
    base_model_prefix = "vision_model"
    main_input_name = "pixel_values"
    input_modalities = "image"
    _no_split_modules = ["BifocalVisionEmbeddings", "BifocalVisionLayer"]
    _keys_to_ignore_on_load_unexpected = [r"^text_model\.", r"_projection\.", r"^logit_(scale|bias)$"]

    def __init__(self, config: BifocalVisionConfig) -> None:
        super().__init__(config)
        self.embeddings = BifocalVisionEmbeddings(config)
        self.layers = nn.ModuleList(BifocalVisionLayer(config, n) for n in range(1, config.num_hidden_layers + 1))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, BifocalVisionEmbeddings):
            init.normal_(module.class_token, std=self.config.initializer_range)
            init.normal_(module.position_embedding, std=self.config.initializer_range)
        depth = getattr(module, "depth", None)
        if isinstance(module, nn.Linear) and isinstance(depth, int):
            # EVA divides what each layer n adds to the residual stream by sqrt(2n).
            init.normal_(module.weight, std=self.config.initializer_range / (2.0 * depth) ** 0.5)

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.patch_embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embeddings.patch_embedding = value

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        pooled_only: bool = False,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Embed images.

        Args:
            pixel_values: (batch, channels, height, width), normalised; height and width may differ from the trained
                size. Rows at the bottom and columns on the right that do not fill a patch are ignored.
            output_attentions, output_hidden_states: whether to return these; as in the configuration when None.
            pooled_only: whether the last layer computes the class token's state only. That saves five sixths of its
                multiplications; the class token's state is the same, and `last_hidden_state` holds nothing else.

        Returns:
            `last_hidden_state` (batch, 1 + patches, width) after the final LayerNorm and `pooler_output` (batch,
            width), its class token; `hidden_states` and (with eager attention) `attentions` if requested.

        Raises:
            ValueError: if there are no pixels, or they have a wrong shape.
        """
        if pixel_values is None:
            raise ValueError("The image tower needs pixel_values.")
        requested = self._requested(output_attentions, output_hidden_states)
        # Whoever asks for states or has a hook on them gets all tokens.
        pooled_only = pooled_only and not (any(requested) or self._forward_hooks or has_hooks(self))
        shape = pixel_values.shape
        if len(shape) == 4:  # the embeddings raise an error for other shapes
            count, tokens = shape[0], 1 + (shape[2] // self.config.patch_size) * (shape[3] // self.config.patch_size)
            if self._can_split(count, pixel_values.device, requested) and count * tokens > CPU_TOKENS:
                pixels = pixel_values
                return self._run_micro_batches(
                    [tokens] * count, tokens, lambda rows, _: self._run(pixels[rows], requested, pooled_only, **kwargs)
                )
        return self._run(pixel_values, requested, pooled_only, **kwargs)

    def _run(
        self, pixel_values: torch.Tensor, requested: tuple[bool, bool], pooled_only: bool, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        hidden_states, rotary = self.embeddings(pixel_values)
        layers = self.layers[:-1] if pooled_only else self.layers
        hidden_states, all_states, all_weights = run_layers(layers, hidden_states, rotary, *requested, **kwargs)
        if pooled_only:
            hidden_states, _ = self.layers[-1](hidden_states, rotary, num_queries=1, **kwargs)

        hidden_states = self.norm(hidden_states)
        return BaseModelOutputWithPooling(
            last_hidden_state=hidden_states,
            pooler_output=hidden_states[:, 0],
            hidden_states=all_states,
            attentions=all_weights,
        )
