"""Published weights as Bifocal models: every tensor is accounted for, or nothing is written."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from bifocal.files import MODEL, replace_folder
from bifocal.hub.families import family_of
from bifocal.hub.source_config import ConversionError, derive_config
from bifocal.hub.weight_layouts import HEAD, LAYOUTS, Layout, Rule, Tensors
from bifocal.hub.weights import read_json, require_numbers, unwrapped
from bifocal.modeling import (
    BifocalConfig,
    BifocalModel,
    BifocalProcessor,
    BifocalTextConfig,
    BifocalTextModel,
    BifocalVisionConfig,
    BifocalVisionModel,
)
from bifocal.modeling.processing_bifocal import image_processor_of_size

# Tensors of a source that are no part of the towers we take, by pattern, with the reason.
_OTHERS = {
    r"cls\.predictions\..*": "the head of masked language modelling",
    r"lm_head\..*": "the head of masked language modelling",
    r"logit_bias": "SigLIP's bias",
}


@dataclass
class Plan:
    """What a conversion will do.

    Args:
        layouts: of the towers found, by "text" and "vision".
        mapping: names of the source and ours, or why one is left out.
        config: of the model that is made.
        tensors: its weights.
    """

    layouts: dict[str, Layout]
    mapping: list[tuple[str, str]]
    config: Any
    tensors: Tensors = field(repr=False, default_factory=dict)

    def text(self) -> str:
        """The mapping as lines, for a dry run."""
        width = max(len(source) for source, _ in self.mapping)
        found = ", ".join(layout.name for layout in self.layouts.values())
        return "\n".join([f"{found}:", *(f"  {source:<{width}}  {target}" for source, target in self.mapping)])


def plan_conversion(tensors: Tensors, source_config: Mapping[str, Any] = {}, image_size: int | None = None) -> Plan:
    """Recognise the layouts, derive the configuration from the tensors, and map every one of them.

    Args:
        source_config: of the source; what it says of sizes must agree with the tensors.
        image_size: resize the position table for pictures of this size.

    Raises:
        ConversionError: no known layout; tensors that are missing, left over or of a wrong shape, with their names; or
            a configuration that contradicts them.
    """
    tensors = unwrapped(tensors)
    names = list(tensors)
    found = {}
    for layout in LAYOUTS:
        prefix = layout.prefix(names)
        if prefix is not None and layout.tower not in found:
            found[layout.tower] = (layout, prefix)
    family = family_of(names, source_config)
    if not found and family is not None:
        raise ConversionError(f"These weights are {family}. bifocal convert takes jina-clip-v1, JinaBERT v2 and EVA02.")
    if not found:
        raise ConversionError(
            f"These {len(names)} tensors are in no layout that is known "
            f"({', '.join(layout.name for layout in LAYOUTS)}); the first is '{names[0] if names else ''}'."
        )
    both = len(found) == 2
    made: Tensors = {}
    mapping: list[tuple[str, str]] = []
    left: list[str] = []
    for name, tensor in tensors.items():
        place = _target(name, tensor, found, both)
        if place is None:
            reason = _dropped(name, found, both)
            if reason is None:
                left.append(name)
            else:
                mapping.append((name, f"left out: {reason}"))
            continue
        for target, part in place.items():
            if target in made:
                raise ConversionError(f"'{name}' gives '{target}' a second time; the source mixes two spellings.")
            made[target] = part
        require_numbers(name, tensor)
        mapping.append((name, ", ".join(place)))
    if left and family is not None:
        raise ConversionError(
            f"These weights are {family}; {len(left)} of their tensors have no place in Bifocal's towers: "
            f"{_some(left)}."
        )
    if left:
        raise ConversionError(f"{len(left)} tensors are left over: {_some(left)}.")
    try:
        config = derive_config(made, found, source_config, tensors)
    except ConversionError:
        raise
    except ValueError as error:
        raise ConversionError(f"No model has tensors of these shapes ({error})") from error
    if image_size is not None:
        _resize(made, config, image_size, both)
    _require_complete(made, config)
    return Plan({tower: layout for tower, (layout, _) in found.items()}, mapping, config, made)


Found = dict[str, tuple[Layout, str]]


def _target(name: str, tensor: torch.Tensor, found: Found, both: bool) -> Tensors | None:
    if both and name == "logit_scale":
        return {"logit_scale": tensor.reshape(1)}
    for tower, (layout, prefix) in found.items():
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
                target if shared else own + target: part.clone()
                for target, part in zip(targets, rule.forth(tensor), strict=True)
            }
    return None


def _dropped(name: str, found: Found, both: bool) -> str | None:
    patterns: dict[str, str] = dict(_OTHERS)
    if not both:
        patterns[r"(.*\.)?logit_scale"] = "the temperature, which a single tower has not"
        if "vision" in found:
            head = re.escape(found["vision"][1]) + r"head\.(weight|bias)"
            patterns[head] = "the head to the shared space, which a single tower has not"
            patterns[r"text\..*"] = "the other tower"
    for layout, prefix in found.values():
        patterns |= {re.escape(prefix) + pattern: reason for pattern, reason in layout.dropped.items()}
    return next((reason for pattern, reason in patterns.items() if re.fullmatch(pattern, name)), None)


def _resize(made: Tensors, config: Any, image_size: int, both: bool) -> None:
    """Interpolate the position table, bicubically, as EVA-CLIP does for other resolutions."""
    vision = config.vision_config if both else config
    name = ("vision_model." if both else "") + "embeddings.position_embedding"
    if not isinstance(vision, BifocalVisionConfig) or image_size % vision.patch_size:
        raise ConversionError(f"Pictures of {image_size} pixels do not go with these weights.")
    table, grid = made[name], image_size // vision.patch_size
    old = vision.image_size // vision.patch_size
    places = table[:, 1:].float().reshape(1, old, old, -1).permute(0, 3, 1, 2)
    places = torch.nn.functional.interpolate(places, (grid, grid), mode="bicubic", align_corners=False)
    made[name] = torch.cat([table[:, :1], places.permute(0, 2, 3, 1).reshape(1, grid * grid, -1).to(table.dtype)], 1)
    vision.image_size = image_size


def _require_complete(made: Tensors, config: Any) -> None:
    """Names and shapes are those of the model that is made; on the meta device, which holds no weights."""
    with torch.device("meta"):
        expected = {name: tuple(value.shape) for name, value in _model(config).state_dict().items()}
    missing = [name for name in expected if name not in made]
    if missing:
        raise ConversionError(f"{len(missing)} tensors are missing: what {_some(missing)} are made of.")
    surplus = [name for name in made if name not in expected]
    if surplus:
        raise ConversionError(f"{len(surplus)} tensors are left over: what {_some(surplus)} are made of.")
    wrong = [name for name, shape in expected.items() if tuple(made[name].shape) != shape]
    if wrong:
        name = wrong[0]
        raise ConversionError(
            f"{len(wrong)} tensors have a wrong shape, first what '{name}' is made of: {tuple(made[name].shape)} where "
            f"{expected[name]} belongs."
        )


def _some(names: list[str]) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:5])
    return shown + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _model(config: Any) -> Any:
    if isinstance(config, BifocalConfig):
        return BifocalModel(config)
    return BifocalTextModel(config) if isinstance(config, BifocalTextConfig) else BifocalVisionModel(config)


def build(plan: Plan) -> Any:
    """The model of a plan: `BifocalModel`, or a single tower, ready to be saved."""
    model = _model(plan.config)
    model.load_state_dict(plan.tensors)
    return model.eval()


def restore(model: Any, layouts: Mapping[str, Layout], prefixes: Mapping[str, str], like: Tensors) -> Tensors:
    """A model's weights in a source's layout again, for those names of `like` that carry weights.

    Raises:
        ConversionError: a name of the layout that the model has nothing for.
    """
    weights = model.state_dict()
    both = len(layouts) == 2
    found: Tensors = {}
    for name in like:
        if name == "logit_scale" and both:
            found[name] = weights["logit_scale"].reshape(like[name].shape)
        for tower, layout in layouts.items():
            if name.startswith(prefixes[tower]):
                restored = _restored(name[len(prefixes[tower]) :], tower, layout, weights, both)
                if restored is not None:
                    found[name] = restored
    return found


def _restored(inner: str, tower: str, layout: Layout, weights: Tensors, both: bool) -> torch.Tensor | None:
    own = f"{tower}_model." if both else ""
    rules: tuple[Rule, ...] = (*layout.rules, *(HEAD if both and tower == "vision" else ()))
    for rule in rules:
        targets = rule.match(inner)
        if targets is not None:
            return rule.back([weights[t if rule in HEAD else own + t] for t in targets])
    return None


def save_converted(model: Any, source: str, out: Path) -> list[str]:
    """Write a converted model, with its tokenizer and image processor where the source has a tokenizer.

    A joint model with a tokenizer becomes a folder ready for the Hub.

    Returns:
        What the folder lacks, in words; nothing if it is complete.

    Raises:
        NotOursError: if `out` may not be replaced (`bifocal.files.require_replaceable`).
    """
    from bifocal.hub.export import export_model

    processor = _processor(source, model.config)
    if isinstance(model, BifocalModel) and processor is not None:
        export_model(model, out, processor)
        return []
    with replace_folder(out, MODEL) as made:
        model.save_pretrained(made)
        if processor is not None:
            processor.save_pretrained(made)
    return [] if processor is not None or isinstance(model, BifocalVisionModel) else ["a tokenizer"]


def _processor(source: str, config: Any) -> BifocalProcessor | None:
    from transformers import AutoTokenizer

    source = os.path.expanduser(source)
    folder = str(Path(source).parent if Path(source).is_file() else source)
    if Path(folder).exists() and not (Path(folder) / "tokenizer_config.json").exists():
        return None
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError):  # no tokenizer there; said by the caller
        return None
    return BifocalProcessor(_image_processor(folder, config), tokenizer)


def _image_processor(folder: str, config: Any) -> Any:
    """CLIP's image processor of the tower's size, with the source's mean, deviation and interpolation if it says them.

    Raises:
        ConversionError: if the source prepares images in another way.
    """
    from transformers.utils import cached_file

    path = cached_file(
        folder, "preprocessor_config.json", _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )  # fmt: skip
    said = read_json(None if path is None else Path(path))
    resize = said.get("resize_mode", "shortest")
    if resize != "shortest":
        raise ConversionError(
            f"The source's preprocessor_config.json says resize_mode={resize!r}, but Bifocal resizes the shorter side "
            "and crops. Its vectors would be others."
        )
    options = {}
    for ours, theirs in (("image_mean", "mean"), ("image_std", "std")):
        if (value := said.get(ours, said.get(theirs))) is not None:
            options[ours] = value
    resample = said.get("resample", said.get("interpolation"))
    if resample is not None:
        try:
            options["resample"] = Image.Resampling[resample.upper()] if isinstance(resample, str) else resample
        except KeyError:
            raise ConversionError(f"The source's interpolation '{resample}' is not one that Pillow has.") from None
    side = getattr(getattr(config, "vision_config", config), "image_size", 224)
    return image_processor_of_size(side, **options)
