# Copyright 2026 The Bifocal authors. Licensed under the Apache License, Version 2.0.
"""Shared by both towers and the joint model: their base class, eager attention, and inference in micro-batches."""

import functools
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from types import MethodType
from typing import Any, cast

import torch
from torch import nn
from torch.nn.modules import module as global_hooks
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import PreTrainedModel

from .configuration_bifocal_base import warn_of_other_code
from .packing_bifocal import micro_batches

# While transformers loads a model, it replaces functions of torch and methods of its classes. Two loads at once would
# restore each other's replacements: weights would stay untied, or be initialised again, in every model of the process.
LOADING = threading.RLock()
if hasattr(os, "register_at_fork"):  # otherwise a child that is forked during a load would wait forever
    os.register_at_fork(before=LOADING.acquire, after_in_parent=LOADING.release, after_in_child=LOADING.release)


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return softmax(q k^T * scaling + mask) v and its weights.

    Args:
        module: attention module, for its training mode.
        query, key, value: (batch, heads, length, head width).
        attention_mask: additive mask that broadcasts to (batch, heads, queries, keys), or None.
        scaling: factor on the scores.
        dropout: probability to drop a weight in training.

    Returns:
        The output (batch, queries, heads, head width) and the weights (batch, heads, queries, keys).
    """
    scores = torch.matmul(query, key.transpose(-1, -2)) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


def usable_implementation(implementation: Any, device: torch.device) -> Any:
    """Return the attention implementation to run: on a CPU "sdpa" instead of "flex_attention", with equal results.

    Compiled for a CPU, flex attention fails from the second input shape on, since Inductor's C++ for dynamic shapes
    does not compile (torch 2.13: "cur_kvSplitSize2 was not declared"), and it has no gradients there. Disabling
    compilation instead would affect the whole process, other threads included.
    """
    if implementation == "flex_attention" and device.type == "cpu":
        return "sdpa"
    return implementation


def split_heads(states: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Reshape (batch, length, width) to (batch, heads, length, head width)."""
    return states.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def run_layers(
    layers: Iterable[nn.Module],
    hidden_states: torch.Tensor,
    positions: Any,
    output_attentions: bool | None,
    output_hidden_states: bool | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, tuple | None, tuple | None]:
    """Pass the states through a tower's layers.

    Args:
        layers: layers of the tower.
        hidden_states: (batch, length, width).
        positions: argument of every layer, the ALiBi bias or the rotary embedding.
        output_attentions, output_hidden_states: whether to return these.
        kwargs: other arguments of every layer.

    Returns:
        The last states; all states (the input first) if requested; the attention weights if requested and if the
        attention implementation returns them (only eager does).
    """
    all_states: tuple[torch.Tensor, ...] = (hidden_states,)
    all_weights: tuple[torch.Tensor, ...] = ()
    for layer in layers:
        hidden_states, weights = layer(hidden_states, positions, output_attentions=output_attentions, **kwargs)
        if output_hidden_states:
            all_states += (hidden_states,)
        if output_attentions and weights is not None:
            all_weights += (weights,)
    return hidden_states, all_states if output_hidden_states else None, all_weights or None


def has_hooks(model: nn.Module) -> bool:
    """Return whether any module within a model has a forward hook that could see its inputs or outputs."""
    if global_hooks._global_forward_hooks or global_hooks._global_forward_pre_hooks:
        return True
    inner = (module for module in model.modules() if module is not model)
    return any(module._forward_hooks or module._forward_pre_hooks for module in inner)


def inference_copy(model: Any) -> Any:
    """Return a copy of a model in eval mode that shares its weights, buffers and hooks.

    Only the module objects are copied, which takes microseconds each. So one thread can embed with a model that another
    one trains: neither sees the other's mode, and the model's own modes do not change.

    A compiled module in eval mode is used itself, since a copy of it would not be compiled.
    """
    return _copied(model, {})


def _copied(original: Any, copies: dict[int, Any]) -> Any:
    """Return the copy of a module.

    As a function within `inference_copy`, it would keep all copies, and so the weights, alive until the next garbage
    collection: a nested function that calls itself refers to itself.

    Args:
        original: module to copy.
        copies: earlier copies by the `id` of their original.
    """
    if original is None or id(original) in copies:
        return copies.get(id(original))
    if isinstance(original, torch.jit.ScriptModule):
        return original
    attributes = original.__dict__.copy()
    children = attributes["_modules"]
    compiled = "_orig_mod" in children or attributes.get("_compiled_call_impl") is not None
    if compiled and not any(module.training for module in original.modules()):
        return original
    if "_orig_mod" in children:  # torch.compile wraps a module in another one
        return _copied(children["_orig_mod"], copies)
    copy = copies[id(original)] = object.__new__(type(original))
    for name in ("forward", "_old_forward"):  # set on the object, by accelerate's hooks for example
        if name in attributes:
            attributes[name] = _bound_to(copy, original, attributes[name])
    attributes["training"] = False
    attributes["_compiled_call_impl"] = None
    if children:
        attributes["_modules"] = {name: _copied(child, copies) for name, child in children.copy().items()}
    object.__setattr__(copy, "__dict__", attributes)
    return copy


def _bound_to(copy: nn.Module, original: nn.Module, function: Any) -> Any:
    """Return a method or partial function of one module object as that of another."""
    if isinstance(function, MethodType) and function.__self__ is original:
        return MethodType(function.__func__, copy)
    if isinstance(function, functools.partial):
        arguments = [copy if argument is original else argument for argument in function.args]
        return functools.partial(function.func, *arguments, **function.keywords)
    return function


class BifocalPreTrainedModel(PreTrainedModel):
    """Base class of all Bifocal models, with the features that they declare to transformers.

    No Bifocal model registers a buffer: transformers 5 builds models on the meta device and does not rebuild
    non-persistent buffers, so values that follow from the configuration (ALiBi slopes, rotary embedding) are computed
    in `forward`.
    """

    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any) -> Any:
        """Load as `PreTrainedModel.from_pretrained` does, one thread at a time; warn if other code saved the model."""
        with LOADING:
            loaded = super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        warn_of_other_code(str(pretrained_model_name_or_path), model.config)
        return loaded

    def _requested(self, output_attentions: bool | None, output_hidden_states: bool | None) -> tuple[bool, bool]:
        """Return the two options of a call, with the configuration's values for None."""
        attentions = self.config.output_attentions if output_attentions is None else output_attentions
        states = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        return bool(attentions), bool(states)

    def _can_split(self, rows: int, device: torch.device, requested: tuple[bool, bool]) -> bool:
        """Return whether a batch may be split: on a CPU, without gradients, tracing, requested states or hooks.

        A hook must see the whole batch, as with transformers' other models.
        """
        if torch.compiler.is_compiling() or torch.jit.is_tracing():  # first: sizes may be unknown there
            return False
        if self.training or torch.is_grad_enabled() or device.type != "cpu" or any(requested):
            return False
        return rows > 1 and not has_hooks(self)

    def _run_micro_batches(
        self, lengths: Sequence[int], padded: int, run: Callable[[list[int], int], BaseModelOutputWithPooling]
    ) -> BaseModelOutputWithPooling:
        """Return the joined output of all micro-batches in the order of rows; states of padding are 0.

        Args:
            lengths: tokens of each row.
            padded: tokens of each row in the output.
            run: computes the output of some rows, truncated to a length.
        """
        states: list[torch.Tensor] = [torch.empty(0)] * len(lengths)
        pooled = list(states)
        for rows in micro_batches(lengths):
            longest = max(1, lengths[rows[0]])
            output = run(rows, longest)
            assert output.last_hidden_state is not None
            assert output.pooler_output is not None
            for row, state, mean in zip(rows, output.last_hidden_state, output.pooler_output, strict=True):
                states[row] = nn.functional.pad(state, (0, 0, 0, padded - longest))
                pooled[row] = mean
        return BaseModelOutputWithPooling(
            last_hidden_state=cast(torch.FloatTensor, torch.stack(states)),
            pooler_output=cast(torch.FloatTensor, torch.stack(pooled)),
        )
