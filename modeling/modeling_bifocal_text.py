# Copyright 2026 The Bifocal authors. Licensed under the Apache License, Version 2.0.
"""The text tower: JinaBERT v2 (arXiv 2310.19923), a post-norm BERT with symmetric ALiBi and a GEGLU feed-forward."""

from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling, MaskedLMOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import can_return_tuple

from .alibi_attention_bifocal import alibi_attention
from .alibi_bifocal import AlibiBias, key_spans
from .configuration_bifocal import BifocalTextConfig
from .modeling_bifocal_base import (
    BifocalPreTrainedModel,
    eager_attention_forward,
    run_layers,
    split_heads,
    usable_implementation,
)
from .packing_bifocal import CPU_TOKENS, PackedAlibi, packs


class BifocalTextEmbeddings(nn.Module):
    """Word plus token-type embedding, LayerNorm, dropout. Positions only enter through ALiBi."""

    def __init__(self, config: BifocalTextConfig) -> None:
        super().__init__()
        self.word_embeddings: nn.Module = nn.Embedding(
            config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id
        )
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        token_type_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
    ) -> torch.Tensor:
        words = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        if token_type_ids is None:
            token_type_ids = torch.zeros(words.shape[:2], dtype=torch.long, device=words.device)
        return self.dropout(self.norm(words + self.token_type_embeddings(token_type_ids)))


class BifocalTextAttention(nn.Module):
    """Attention softmax(q k^T / sqrt(d) - slope_h |i - j|) v; all four matrices have a bias."""

    def __init__(self, config: BifocalTextConfig) -> None:
        super().__init__()
        self.config = config
        self.is_causal = False
        self.scaling = (config.hidden_size // config.num_attention_heads) ** -0.5
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self, hidden_states: torch.Tensor, bias: AlibiBias | PackedAlibi, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        heads = self.config.num_attention_heads
        query = split_heads(self.q_proj(hidden_states), heads)
        key = split_heads(self.k_proj(hidden_states), heads)
        value = split_heads(self.v_proj(hidden_states), heads)

        implementation = usable_implementation(self.config._attn_implementation, query.device)
        output, weights = alibi_attention(
            ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward),
            implementation,
            self,
            query,
            key,
            value,
            bias,
            scaling=self.scaling,
            dropout=self.config.attention_probs_dropout_prob if self.training else 0.0,
            **kwargs,
        )
        return self.out_proj(output.flatten(2)), weights


class BifocalTextMLP(nn.Module):
    """GEGLU (arXiv 2002.05202): W_down (gelu(W_gate x) * W_up x) + b, with W_gate and W_up in one matrix."""

    def __init__(self, config: BifocalTextConfig) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.activation = ACT2FN[config.hidden_act]
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up_proj(hidden_states).chunk(2, dim=-1)
        return self.down_proj(self.dropout(self.activation(gate) * up))


class BifocalTextLayer(GradientCheckpointingLayer):
    """Attention and feed-forward, each followed by a residual and a LayerNorm (post-norm, as in BERT)."""

    def __init__(self, config: BifocalTextConfig) -> None:
        super().__init__()
        self.attention = BifocalTextAttention(config)
        self.attention_dropout = nn.Dropout(config.hidden_dropout_prob)
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = BifocalTextMLP(config)
        self.mlp_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(
        self, hidden_states: torch.Tensor, bias: AlibiBias | PackedAlibi, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        attended, weights = self.attention(hidden_states, bias, **kwargs)
        hidden_states = self.attention_norm(hidden_states + self.attention_dropout(attended))
        return self.mlp_norm(hidden_states + self.mlp(hidden_states)), weights


class BifocalTextPreTrainedModel(BifocalPreTrainedModel):
    config_class = BifocalTextConfig
    base_model_prefix = "text_model"
    input_modalities = "text"
    _no_split_modules = ["BifocalTextEmbeddings", "BifocalTextLayer"]


class BifocalTextModel(BifocalTextPreTrainedModel):
    """The text tower: token ids to token states and their mean over the tokens that are not padding.

    It can be loaded from a folder of the joint model; the other weights are ignored.
    """

    _keys_to_ignore_on_load_unexpected = [r"^vision_model\.", r"_projection\.", r"^logit_(scale|bias)$", r"^lm_head\."]

    def __init__(self, config: BifocalTextConfig) -> None:
        super().__init__(config)
        self.embeddings = BifocalTextEmbeddings(config)
        self.layers = nn.ModuleList(BifocalTextLayer(config) for _ in range(config.num_hidden_layers))
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embeddings.word_embeddings = value

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Embed texts.

        Args:
            input_ids: (batch, length) token ids.
            attention_mask: (batch, length), 1 for a token and 0 for padding; no padding when None.
            token_type_ids: (batch, length); all 0 when None.
            inputs_embeds: (batch, length, width) word embeddings instead of `input_ids`.
            output_attentions, output_hidden_states: whether to return these; as in the configuration when None.

        Returns:
            `last_hidden_state` (batch, length, width) and `pooler_output` (batch, width), the mean of the states that
            are not padding; `hidden_states` and (with eager attention) `attentions` if requested.

        Raises:
            ValueError: if not exactly one of `input_ids` and `inputs_embeds` is set, a text is longer than
                `config.max_position_embeddings`, or the mask has another shape than the texts.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("The text tower needs exactly one of input_ids and inputs_embeds.")
        texts: torch.Tensor = input_ids if inputs_embeds is None else inputs_embeds  # type: ignore[assignment]
        batch, length = texts.shape[:2]
        if attention_mask is not None and attention_mask.shape != (batch, length):
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)}, but the texts have ({batch}, {length}); "
                "give 1 for each token and 0 for padding."
            )
        if length > self.config.max_position_embeddings:
            raise ValueError(
                f"The text is {length} tokens long, but this model takes at most {self.config.max_position_embeddings} "
                "(config.max_position_embeddings); truncate it."
            )
        requested = self._requested(output_attentions, output_hidden_states)
        inputs = (input_ids, attention_mask, token_type_ids, inputs_embeds)
        if not self._can_split(batch, self.device, requested):
            return self._run(requested, *inputs, **kwargs)
        fits = batch * length <= CPU_TOKENS
        spans = [(0, length)] * batch if attention_mask is None else key_spans(attention_mask == 0)
        if fits and (spans is None or all(span == (0, length) for span in spans)):
            return self._run(requested, *inputs, **kwargs)
        if spans is not None and all(start < stop for start, stop in spans):
            return self._run_packed(spans, length, input_ids, token_type_ids, inputs_embeds, **kwargs)
        # A text with padding between its tokens, or without any token, keeps its padding.
        assert attention_mask is not None
        numbers = torch.arange(1, length + 1, device=attention_mask.device)
        return self._run_micro_batches(
            ((attention_mask != 0) * numbers).amax(1).tolist(),
            length,
            lambda rows, longest: self._run(
                requested, *(None if tensor is None else tensor[rows, :longest] for tensor in inputs), **kwargs
            ),
        )

    def computes_padding(self) -> bool:
        """Return whether a batch without gradients is computed with its padding, as on a GPU or with hooks."""
        return not self._can_split(2, self.device, self._requested(None, None))

    def _run_packed(
        self, spans: list[tuple[int, int]], length: int, *inputs: torch.Tensor | None, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """Return the output of texts without computing their padding, whose states are 0.

        Args:
            spans: first token of each text and the end of its tokens.
            length: tokens of each row of the output.
            inputs: token ids, token types and word embeddings (batch, length, ...), each or None.
        """
        lengths = [stop - start for start, stop in spans]
        states: torch.Tensor | None = None
        pooled: list[torch.Tensor] = [torch.empty(0)] * len(spans)
        for texts in packs(lengths):
            sizes = [lengths[n] for n in texts]
            parts = (x if x is None else torch.cat([x[n, slice(*spans[n])] for n in texts])[None] for x in inputs)
            hidden_states = self.embeddings(*parts)
            implementation = usable_implementation(self.config._attn_implementation, hidden_states.device)
            longest = AlibiBias(self.config.num_attention_heads, hidden_states[:, : sizes[0]], None, implementation)
            # The bias of a single text may be too large to be held whole.
            bias = longest if len(texts) == 1 else PackedAlibi(sizes, longest)
            hidden_states = run_layers(self.layers, hidden_states, bias, False, False, **kwargs)[0]
            if states is None:
                states = hidden_states.new_zeros(len(spans), length, hidden_states.shape[-1])
            for n, state in zip(texts, hidden_states[0].split(sizes), strict=True):
                states[n, slice(*spans[n])] = state
                pooled[n] = state.float().mean(0).to(state.dtype)
        return BaseModelOutputWithPooling(last_hidden_state=states, pooler_output=torch.stack(pooled))

    def _run(
        self,
        requested: tuple[bool, bool],
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        token_type_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        hidden_states = self.embeddings(input_ids, token_type_ids, inputs_embeds)
        if attention_mask is None:
            attention_mask = torch.ones(hidden_states.shape[:2], dtype=torch.long, device=hidden_states.device)
            padding = None
        else:
            padding = attention_mask == 0
        implementation = usable_implementation(self.config._attn_implementation, hidden_states.device)
        bias = AlibiBias(self.config.num_attention_heads, hidden_states, padding, implementation)
        hidden_states, all_states, all_weights = run_layers(self.layers, hidden_states, bias, *requested, **kwargs)

        # In float32: bfloat16 is too coarse for a sum over 8,192 tokens.
        mask = (attention_mask != 0).unsqueeze(-1).float()
        pooled = (hidden_states.float() * mask).sum(1) / mask.sum(1).clamp(min=1.0)
        return BaseModelOutputWithPooling(
            last_hidden_state=hidden_states,
            pooler_output=pooled.to(hidden_states.dtype),
            hidden_states=all_states,
            attentions=all_weights,
        )


class BifocalMLMHead(nn.Module):
    """BERT's head for masked language modelling: dense, activation, LayerNorm, decoder tied to the word embedding."""

    def __init__(self, config: BifocalTextConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation = ACT2FN[config.hidden_act]
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.norm(self.activation(self.dense(hidden_states))))


class BifocalTextForMaskedLM(BifocalTextPreTrainedModel):
    """The text tower with a masked-language-modelling head, for stage 0.

    Attributes:
        sparse_prediction: with labels, predict only the tokens that have one, as training needs them: `logits` is then
            (labelled tokens, vocabulary). The loss is the same, at a fraction of the time and memory.
    """

    sparse_prediction = False
    _tied_weights_keys = {"lm_head.decoder.weight": "text_model.embeddings.word_embeddings.weight"}

    def __init__(self, config: BifocalTextConfig) -> None:
        super().__init__(config)
        self.text_model = BifocalTextModel(config)
        self.lm_head = BifocalMLMHead(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.text_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.text_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head.decoder

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm_head.decoder = new_embeddings

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> MaskedLMOutput:
        """Predict the tokens of texts.

        Args:
            labels: (batch, length) token ids to predict, -100 for tokens that do not enter the loss. The other
                arguments are those of [`BifocalTextModel`].

        Returns:
            `logits` (batch, length, vocabulary) and, with labels, `loss`, the mean cross-entropy.
        """
        outputs = self.text_model(input_ids, attention_mask, token_type_ids, inputs_embeds, return_dict=True, **kwargs)
        states = outputs.last_hidden_state
        if labels is not None and self.sparse_prediction:
            states, labels = states[labels != -100], labels[labels != -100]
        logits = self.lm_head(states)
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits.flatten(0, -2).float(), labels.flatten())
        return MaskedLMOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )
