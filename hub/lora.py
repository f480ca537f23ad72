"""Merges the LoRA adapters (arXiv 2106.09685) of jina-embeddings-v3 and jina-clip-v2 into the weights that they adapt.

Facts: an adapted weight W of these models is stored as a parametrisation of torch: `*.parametrizations.weight.original`
is W; `*.parametrizations.weight.0.lora_A` and `.lora_B` have one matrix for each name in `lora_adaptations`. A linear
layer computes with W + alpha / rank * B A, an embedding with W + alpha / rank * A B.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from bifocal.hub.checkpoint_files import ConversionError
from bifocal.hub.source_config import tower_settings
from bifocal.hub.weight_layouts import Tensors
from bifocal.hub.weights import require_floats

NO_ADAPTER = "none"
_ADAPTED = re.compile(r"(?P<layer>.+)\.parametrizations\.weight\.(?P<part>original|0\.lora_A|0\.lora_B)")
_PARTS = ("original", "0.lora_A", "0.lora_B")


@dataclass
class MergedWeights:
    """A source's tensors without parametrisations.

    Args:
        tensors: the tensors by name, adapted weights as `*.weight`.
        adapter: name of the merged adapter; None if the source has adapters and none was merged, or has none.
        adapters: names of all adapters of the source.
        parts: names in the source of the original weight, A and B of each adapted weight, by its name in `tensors`.
    """

    tensors: Tensors
    adapter: str | None
    adapters: tuple[str, ...]
    parts: dict[str, tuple[str, str, str]]


def merge_adapter(tensors: Tensors, source_config: Mapping[str, Any], adapter: str | None = None) -> MergedWeights:
    """Return the tensors with one adapter merged into the weights in float32, or with none.

    Args:
        tensors: the source's weights by name.
        source_config: the source's configuration, which names the adapters.
        adapter: name of the adapter, or "none"; the one that the source computes with by default
            (`default_lora_task`) when None.

    Raises:
        ConversionError: if the source has no such adapter, or its adapters are incomplete or contradict the
            configuration.
    """
    adapted: dict[str, dict[str, str]] = {}
    for name in tensors:
        if match := _ADAPTED.fullmatch(name):
            adapted.setdefault(match["layer"], {})[match["part"]] = name
    if not adapted:
        if adapter not in (None, NO_ADAPTER):
            raise ConversionError(f"This source has no adapters, so there is no '{adapter}'. Omit --adapter.")
        return MergedWeights(tensors, None, (), {})
    settings = tower_settings(source_config, "text")
    names = settings.get("lora_adaptations") or ()
    number = _number(names, settings.get("default_lora_task") if adapter is None else adapter)
    merged = {name: tensor for name, tensor in tensors.items() if not _ADAPTED.fullmatch(name)}
    parts: dict[str, tuple[str, str, str]] = {}
    for layer, stored in adapted.items():
        missing = [part for part in _PARTS if part not in stored]
        if missing:
            raise ConversionError(f"1 tensor is missing: '{layer}.parametrizations.weight.{missing[0]}'.")
        target = f"{layer}.weight"
        if target in merged:
            raise ConversionError(f"'{target}' is there a second time, with an adapter. Remove one of them.")
        original, first, second = parts[target] = (stored[_PARTS[0]], stored[_PARTS[1]], stored[_PARTS[2]])
        for name in parts[target]:
            require_floats(name, tensors[name])
        rank = _rank(tensors, parts[target], len(names) or None)
        merged[target] = tensors[original]
        if number is not None:
            scale = _scale(settings, first, rank)
            pair = (tensors[second][number], tensors[first][number])
            factors = pair[::-1] if _is_embedding(layer) else pair
            merged[target] = torch.addmm(tensors[original].float(), *(one.float() for one in factors), alpha=scale)
    return MergedWeights(merged, None if number is None else names[number], tuple(names), parts)


def _number(names: Any, adapter: str | None) -> int | None:
    """Return the position of an adapter among the names; None for no adapter.

    Raises:
        ConversionError: if there is no such adapter.
    """
    if adapter == NO_ADAPTER:
        return None
    if not isinstance(names, list | tuple) or not names:
        raise ConversionError(
            f"The source's config.json does not name its adapters (lora_adaptations). Pass --adapter {NO_ADAPTER} to "
            "convert it without."
        )
    if adapter is None:
        return None
    if adapter not in names:
        raise ConversionError(
            f"The source has no adapter '{adapter}'. Pass --adapter with one of {', '.join([*names, NO_ADAPTER])}."
        )
    return list(names).index(adapter)


def _rank(tensors: Tensors, parts: tuple[str, str, str], count: int | None) -> int:
    """Return the rank of the adapters of a weight.

    Args:
        tensors: the source's weights by name.
        parts: names of the original weight, A and B.
        count: number of adapters; not checked when None.

    Raises:
        ConversionError: if their shapes do not fit the weight.
    """
    weight, first, second = (tuple(tensors[name].shape) for name in parts)
    embedding = _is_embedding(parts[0])
    if len(weight) == len(first) - 1 == len(second) - 1 == 2:
        rank = first[2] if embedding else first[1]
        rows, columns = weight
        expected = ((rows, rank), (rank, columns)) if embedding else ((rank, columns), (rows, rank))
        if (first[1:], second[1:]) == expected and first[0] == second[0] and count in (None, first[0]):
            return rank
    raise ConversionError(
        f"'{parts[1]}' and '{parts[2].rpartition('.')[2]}' have shapes {first} and {second}, which are not "
        f"{'adapters' if count is None else f'{count} adapters'} of a weight of shape {weight}."
    )


def _is_embedding(layer: str) -> bool:
    return ".embeddings." in f".{layer}"


def _scale(settings: Mapping[str, Any], name: str, rank: int) -> float:
    """Return alpha / rank.

    Raises:
        ConversionError: if the configuration has no alpha, or another rank.
    """
    alpha = settings.get("lora_alpha")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float):
        raise ConversionError(
            "The source's config.json has no lora_alpha, so the strength of its adapters is unknown. Add it, or pass "
            f"--adapter {NO_ADAPTER}."
        )
    if settings.get("lora_rank", rank) != rank:
        raise ConversionError(
            f"The source's configuration says lora_rank={settings['lora_rank']}, but '{name}' has {rank}. Correct it "
            "in its config.json."
        )
    return alpha / rank
