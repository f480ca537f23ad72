# Copyright 2026 The Bifocal authors. Licensed under the Apache License, Version 2.0.
"""What both towers and the joint model share: the base class and the plain form of attention."""

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

from .configuration_bifocal import warn_of_other_code

# While transformers loads, it replaces functions of torch and methods of its own classes. Two loads at once put each
# other's replacements back: weights would stay untied, or be initialised again, in every model of the process.
_LOADING = threading.RLock()
if hasattr(os, "register_at_fork"):  # a child that was forked meanwhile would wait for ever
    os.register_at_fork(before=_LOADING.acquire, after_in_parent=_LOADING.release, after_in_child=_LOADING.release)
# Tokens that a tower takes at once on a CPU when it only infers. More gains nothing there: their activations leave the
# caches, and each layer fills fresh pages of memory. 1,024 took a third to a half of the time of 32 texts of up to 512
# tokens for widths of 384 and 768, and 512 or 2,048 about as long.
_CPU_TOKENS = 1024


def pieces(lengths: Sequence[int], limit: int = _CPU_TOKENS) -> list[list[int]]:
    """Rows of these lengths, longest first, in pieces of at most `limit` tokens when each is padded to its longest."""
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    found, start = [], 0
    while start < len(order):
        stop = start + max(1, limit // max(1, lengths[order[start]]))
        found.append(order[start:stop])
        start = stop
    return found


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
    """softmax(q k^T * scaling + mask) v, the form that returns its weights.

    Args:
        query, key, value: (batch, heads, length, head width).
        attention_mask: additive, broadcastable to (batch, heads, queries, keys), or None.

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
    """Return the attention implementation to run: on a CPU "sdpa" in place of "flex_attention", with equal results.

    Compiled for a CPU, flex attention fails from the second input shape on, since Inductor's C++ for shapes that vary
    does not compile (torch 2.13: "cur_kvSplitSize2 was not declared"). Switching compilation off instead would be a
    setting of the whole process, which other threads would see.
    """
    if implementation == "flex_attention" and device.type == "cpu" and not torch.compiler.is_compiling():
        return "sdpa"
    return implementation


def split_heads(states: torch.Tensor, num_heads: int) -> torch.Tensor:
    """(batch, length, width) to (batch, heads, length, head width)."""
    return states.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def run_layers(
    layers: Iterable[nn.Module],
    hidden_states: torch.Tensor,
    positions: Any,
    output_attentions: bool | None,
    output_hidden_states: bool | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, tuple | None, tuple | None]:
    """Pass the states through a tower's layers; `positions` is what they share, the ALiBi bias or the rotary tables.

    Returns:
        The last states, all states (the input's first) if asked for, and the attention weights if asked for and if the
        attention implementation gives them (only eager does).
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


def _has_hooks(model: nn.Module) -> bool:
    """Return whether any module within a model has a forward hook that could see its inputs or outputs."""
    if global_hooks._global_forward_hooks or global_hooks._global_forward_pre_hooks:
        return True
    inner = (module for module in model.modules() if module is not model)
    return any(module._forward_hooks or module._forward_pre_hooks for module in inner)


def inference_copy(model: Any) -> Any:
    """Return a copy of a model in eval mode that shares its weights, buffers and hooks.

    Only the module objects are copied, which takes microseconds each. So a thread can embed with a model that another
    thread trains: neither sees the other's mode, and modes that differ between modules stay as they are.

    A compiled module that is in eval mode is used as it is, since a copy of it would not be compiled.
    """
    return _copied(model, {})


def _copied(original: Any, copies: dict[int, Any]) -> Any:
    """Return the copy of a module. (As a function within `inference_copy` this would keep all copies, and so the
    weights, alive until Python collects garbage: a function that calls itself refers to itself.)

    Args:
        copies: those made before, by the `id` of their original.
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
    if "_orig_mod" in children:  # torch.compile wraps a module into another one
        return _copied(children["_orig_mod"], copies)
    copy = copies[id(original)] = object.__new__(type(original))
    for name in ("forward", "_old_forward"):  # set on the object by accelerate's hooks, for one
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
    """Weights initialisation and the abilities every Bifocal model declares to transformers.

    No Bifocal model registers a buffer: transformers 5 builds models on the meta device and does not rebuild
    non-persistent buffers, so what follows from the configuration (ALiBi slopes, rotary tables) is made in `forward`.
    """

    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any) -> Any:
        """As `PreTrainedModel.from_pretrained`; warns if the model was saved with other code than runs it.

        Threads load one after the other.
        """
        with _LOADING:
            loaded = super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        warn_of_other_code(str(pretrained_model_name_or_path), model.config)
        return loaded

    def _requested(self, output_attentions: bool | None, output_hidden_states: bool | None) -> tuple[bool, bool]:
        """What a call asks for, the configuration's defaults filled in."""
        attentions = self.config.output_attentions if output_attentions is None else output_attentions
        states = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        return bool(attentions), bool(states)

    def _takes_pieces(self, rows: int, tokens: int, device: torch.device, requested: tuple[bool, bool]) -> bool:
        """Whether a batch is taken in pieces: on a CPU, with nothing to learn from, nothing to trace, and no hooks.

        A hook must see the whole batch, as transformers' other models show it.
        """
        if torch.compiler.is_compiling() or torch.jit.is_tracing():  # first: sizes may be unknown there
            return False
        if self.training or torch.is_grad_enabled() or device.type != "cpu" or any(requested):
            return False
        return rows > 1 and tokens > _CPU_TOKENS and not _has_hooks(self)

    def _by_pieces(
        self, lengths: Sequence[int], padded: int, run: Callable[[list[int], int], BaseModelOutputWithPooling]
    ) -> BaseModelOutputWithPooling:
        """The output of `run(rows, length)` over all pieces, rows in order; states of padding that was cut off are 0.

        Args:
            padded: tokens of each row in the output.
        """
        states: list[torch.Tensor] = [torch.empty(0)] * len(lengths)
        pooled = list(states)
        for rows in pieces(lengths):
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
