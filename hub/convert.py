"""Published weights as Bifocal models: every tensor is accounted for, or nothing is written."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bifocal.files import MODEL, replace_folder
from bifocal.hub.card import Card
from bifocal.hub.checkpoint_files import ConversionError
from bifocal.hub.export import export_model
from bifocal.hub.families import JINA_EMBEDDINGS_V3, family_of
from bifocal.hub.lora import MergedWeights, merge_adapter
from bifocal.hub.source_config import derive_config
from bifocal.hub.source_files import read_processor
from bifocal.hub.weight_layouts import HEAD, LAYOUTS, XLM_R_FLASH, Rule, Tensors, TowerLayout, WeightLayout
from bifocal.hub.weights import remove_wrapper_prefix, require_floats
from bifocal.modeling import (
    BifocalConfig,
    BifocalModel,
    BifocalTextConfig,
    BifocalTextModel,
    BifocalVisionConfig,
    BifocalVisionModel,
)

_CONVERTED = "bifocal convert takes jina-clip-v1 and v2, JinaBERT v2 and EVA02."
# Tensors of a source that belong to neither tower: pattern and reason.
_IGNORED = {
    r"cls\.predictions\..*": "the head of masked language modelling",
    r"lm_head\..*": "the head of masked language modelling",
    r"logit_bias": "SigLIP's bias",
}


@dataclass
class ConversionPlan:
    """The result of mapping a source's tensors, before a model is built.

    Args:
        layouts: layout of each tower in the source, by "text" and "vision".
        mapping: pairs of a tensor's name in the source and its names in Bifocal, or the reason why it is skipped.
        config: configuration of the Bifocal model.
        adapter: name of the LoRA adapter that is merged into the weights; None without one.
        adapters: names of the source's adapters.
        tensors: weights of the Bifocal model.
    """

    layouts: dict[str, WeightLayout]
    mapping: list[tuple[str, str]]
    config: Any
    adapter: str | None = None
    adapters: tuple[str, ...] = ()
    tensors: Tensors = field(repr=False, default_factory=dict)

    def text(self) -> str:
        """Return the mapping as lines, for a dry run."""
        width = max(len(source) for source, _ in self.mapping)
        parts = [*(layout.name for layout in self.layouts.values()), *([self.adapter_text()] if self.adapters else [])]
        lines = [f"  {source:<{width}}  {target}" for source, target in self.mapping]
        return "\n".join([f"{', '.join(parts)}:", *lines])

    def adapter_text(self) -> str:
        """Return which of the source's adapters is merged, as a part of a sentence."""
        return (
            f"with the adapter {self.adapter}" if self.adapter else f"without the adapters {', '.join(self.adapters)}"
        )


def plan_conversion(
    tensors: Tensors,
    source_config: Mapping[str, Any] = {},
    image_size: int | None = None,
    adapter: str | None = None,
) -> ConversionPlan:
    """Recognise the layouts, derive the configuration and map every tensor; return the plan.

    Args:
        tensors: the source's weights by name.
        source_config: the source's configuration; its sizes must agree with the tensors.
        image_size: side of the images in pixels to resize the position table for; unchanged when None.
        adapter: name of the LoRA adapter to merge into the weights, or "none"; the source's default when None.

    Raises:
        ConversionError: if no layout is known, tensors are missing, left over or of a wrong shape, or the configuration
            contradicts them; the message names them.
    """
    merged = merge_adapter(remove_wrapper_prefix(tensors), source_config, adapter)
    tensors = merged.tensors
    names = list(tensors)
    towers: dict[str, TowerLayout] = {}
    for layout in LAYOUTS:
        prefix = layout.prefix(names)
        if prefix is not None and layout.tower not in towers:
            towers[layout.tower] = (layout, prefix)
    family = family_of(names, source_config)
    if not towers and family is not None:
        raise ConversionError(f"These weights are {family}. {_CONVERTED}")
    if not towers:
        raise ConversionError(
            f"These {len(names)} tensors match no known layout ({', '.join(layout.name for layout in LAYOUTS)}). The "
            f"first is '{names[0] if names else ''}'."
        )
    both = len(towers) == 2
    if not both and "text" in towers and towers["text"][0] is XLM_R_FLASH:
        raise ConversionError(f"These weights are {JINA_EMBEDDINGS_V3}. {_CONVERTED}")
    converted: Tensors = {}
    mapping: list[tuple[str, str]] = []
    unknown: list[str] = []
    for name, tensor in tensors.items():
        targets = _convert_tensor(name, tensor, towers, both)
        if targets is None:
            reason = _ignored_reason(name, towers, both)
            if reason is None:
                unknown.append(name)
            else:
                mapping.append((name, f"skipped: {reason}"))
            continue
        for target, part in targets.items():
            if target in converted:
                raise ConversionError(f"'{name}' gives '{target}' a second time; the source mixes two spellings.")
            converted[target] = part
        require_floats(name, tensor)
        mapping.append((name, ", ".join(targets)))
    if unknown and family is not None:
        raise ConversionError(
            f"These weights are {family}; {len(unknown)} of their tensors do not exist in Bifocal's towers: "
            f"{_first_names(unknown)}."
        )
    if unknown:
        raise ConversionError(f"{len(unknown)} tensors are left over: {_first_names(unknown)}.")
    try:
        config = derive_config(converted, towers, source_config, tensors)
    except ConversionError:
        raise
    except ValueError as error:
        raise ConversionError(f"No model has tensors of these shapes ({error})") from error
    if image_size is not None:
        _resize_position_table(converted, config, image_size, both)
    _require_complete(converted, config)
    return ConversionPlan(
        {tower: layout for tower, (layout, _) in towers.items()},
        _with_parts(mapping, merged), config, merged.adapter, merged.adapters, converted,
    )  # fmt: skip


def _with_parts(mapping: list[tuple[str, str]], merged: MergedWeights) -> list[tuple[str, str]]:
    """Return a mapping in which adapted weights are the three tensors that the source has of each."""
    named: list[tuple[str, str]] = []
    for name, target in mapping:
        if name not in merged.parts:
            named.append((name, target))
            continue
        original, *factors = merged.parts[name]
        named.append((original, target))
        skipped = target.startswith("skipped")
        kept = f"merged into {target}" if merged.adapter else "skipped: adapters, of which none is merged"
        named += [(factor, target if skipped else kept) for factor in factors]
    return named


def _convert_tensor(name: str, tensor: torch.Tensor, towers: Mapping[str, TowerLayout], both: bool) -> Tensors | None:
    """Return Bifocal's tensors for one of the source; None if no rule takes it."""
    if both and name == "logit_scale":
        return {"logit_scale": tensor.reshape(1)}
    for tower, (layout, prefix) in towers.items():
        if not name.startswith(prefix):
            continue
        inner = name[len(prefix) :]
        own = f"{tower}_model." if both else ""
        for rule in (*layout.rules, *(HEAD if both and tower == "vision" else ())):
            targets = rule.match(inner)
            if targets is None:
                continue
            if len(tensor) % max(1, len(targets)) if tensor.ndim else len(targets) > 1:
                raise ConversionError(
                    f"'{name}' has shape {tuple(tensor.shape)}, which is not {len(targets)} equal parts."
                )
            shared = rule in HEAD
            return {
                target if shared else own + target: part
                for target, part in zip(targets, rule.to_bifocal(tensor), strict=True)
            }
    return None


def _ignored_reason(name: str, towers: Mapping[str, TowerLayout], both: bool) -> str | None:
    patterns: dict[str, str] = dict(_IGNORED)
    if not both:
        patterns[r"(.*\.)?logit_scale"] = "the temperature, which a single tower does not have"
        if "vision" in towers:
            head = re.escape(towers["vision"][1]) + r"head\.(weight|bias)"
            patterns[head] = "the head into the shared space, which a single tower does not have"
            patterns[r"text\..*"] = "the other tower"
    for layout, prefix in towers.values():
        patterns |= {re.escape(prefix) + pattern: reason for pattern, reason in layout.ignored.items()}
    return next((reason for pattern, reason in patterns.items() if re.fullmatch(pattern, name)), None)


def _resize_position_table(tensors: Tensors, config: Any, image_size: int, both: bool) -> None:
    """Interpolate the position table bicubically, as EVA-CLIP does for other resolutions."""
    vision = config.vision_config if both else config
    name = ("vision_model." if both else "") + "embeddings.position_embedding"
    if not isinstance(vision, BifocalVisionConfig):
        raise ConversionError("These weights have no image tower. Omit --image-size.")
    if image_size < vision.patch_size:
        raise ConversionError(
            f"Images of {image_size} pixels are smaller than a patch. Give at least {vision.patch_size}."
        )
    table, grid = tensors[name], image_size // vision.patch_size
    old = vision.image_size // vision.patch_size
    patches = table[:, 1:].float().reshape(1, old, old, -1).permute(0, 3, 1, 2)
    patches = torch.nn.functional.interpolate(patches, (grid, grid), mode="bicubic", align_corners=False)
    patches = patches.permute(0, 2, 3, 1).reshape(1, grid * grid, -1).to(table.dtype)
    tensors[name] = torch.cat([table[:, :1], patches], 1)
    vision.image_size = image_size


def _require_complete(tensors: Tensors, config: Any) -> None:
    """Check that names and shapes are those of the Bifocal model, built on the meta device, which holds no weights."""
    with torch.device("meta"):
        expected = {name: tuple(value.shape) for name, value in _new_model(config).state_dict().items()}
    missing = [name for name in expected if name not in tensors]
    if missing:
        raise ConversionError(f"{len(missing)} tensors are missing: what {_first_names(missing)} are made of.")
    surplus = [name for name in tensors if name not in expected]
    if surplus:
        raise ConversionError(f"{len(surplus)} tensors are left over: what {_first_names(surplus)} are made of.")
    wrong = [name for name, shape in expected.items() if tuple(tensors[name].shape) != shape]
    if wrong:
        name = wrong[0]
        raise ConversionError(
            f"{len(wrong)} tensors have a wrong shape, first what '{name}' is made of: {tuple(tensors[name].shape)} "
            f"and not {expected[name]}."
        )


def _first_names(names: list[str]) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:5])
    return shown + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _new_model(config: Any) -> Any:
    if isinstance(config, BifocalConfig):
        return BifocalModel(config)
    return BifocalTextModel(config) if isinstance(config, BifocalTextConfig) else BifocalVisionModel(config)


def build_model(plan: ConversionPlan) -> Any:
    """Return the model of a plan, a `BifocalModel` or a single tower."""
    model = _new_model(plan.config)
    model.load_state_dict(plan.tensors)
    return model.eval()


def to_source_layout(
    model: Any, layouts: Mapping[str, WeightLayout], prefixes: Mapping[str, str], like: Tensors
) -> Tensors:
    """Return a model's weights in the source's layout, for those names of `like` that carry weights."""
    weights = model.state_dict()
    both = len(layouts) == 2
    restored: Tensors = {}
    for name in like:
        if name == "logit_scale" and both:
            restored[name] = weights["logit_scale"].reshape(like[name].shape)
        for tower, layout in layouts.items():
            if name.startswith(prefixes[tower]):
                tensor = _to_source_tensor(name[len(prefixes[tower]) :], tower, layout, weights, both)
                if tensor is not None:
                    restored[name] = tensor
    return restored


def _to_source_tensor(
    inner: str, tower: str, layout: WeightLayout, weights: Tensors, both: bool
) -> torch.Tensor | None:
    own = f"{tower}_model." if both else ""
    rules: tuple[Rule, ...] = (*layout.rules, *(HEAD if both and tower == "vision" else ()))
    for rule in rules:
        targets = rule.match(inner)
        if targets is not None:
            return rule.to_source([weights[t if rule in HEAD else own + t] for t in targets])
    return None


def save_converted(model: Any, source: str, out: Path, licence: str | None = None, adapter: str = "") -> list[str]:
    """Write a converted model, with a processor if the source has a tokenizer; return what is missing in the folder.

    A joint model with a tokenizer becomes a folder that is ready for the Hub.

    Args:
        model: as from `build_model`.
        source: Hub id, folder or file that the weights came from.
        out: folder to write.
        licence: name of the weights' licence on the Hub, for the card.
        adapter: which of the source's adapters is merged, for the card (`ConversionPlan.adapter_text`).

    Raises:
        NotOursError: if `out` may not be replaced (`bifocal.files.require_replaceable`).
    """
    processor = read_processor(source, model.config)
    if isinstance(model, BifocalModel) and processor is not None:
        name = source if not Path(source).expanduser().exists() else Path(source).name
        description = " ".join(["A Bifocal model with the weights of", name, *([adapter] if adapter else [])])
        export_model(model, out, processor, Card(description=f"{description}.", license=licence))
        return []
    with replace_folder(out, MODEL) as scratch:
        model.save_pretrained(scratch)
        if processor is not None:
            processor.save_pretrained(scratch)
        if licence is not None:
            (scratch / "README.md").write_text(f"---\nlicense: {licence}\n---\n", encoding="utf-8")
    return [] if processor is not None or isinstance(model, BifocalVisionModel) else ["tokenizer"]
