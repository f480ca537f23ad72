"""Published weights as Bifocal models: every tensor is accounted for, or nothing is written."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoTokenizer
from transformers.utils import cached_file

from bifocal.files import MODEL, replace_folder
from bifocal.hub.export import export_model
from bifocal.hub.families import family_of
from bifocal.hub.source_config import ConversionError, derive_config
from bifocal.hub.weight_layouts import HEAD, LAYOUTS, Rule, Tensors, TowerLayout, WeightLayout
from bifocal.hub.weights import read_json, remove_wrapper_prefix, require_floats
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
        tensors: weights of the Bifocal model.
    """

    layouts: dict[str, WeightLayout]
    mapping: list[tuple[str, str]]
    config: Any
    tensors: Tensors = field(repr=False, default_factory=dict)

    def text(self) -> str:
        """Return the mapping as lines, for a dry run."""
        width = max(len(source) for source, _ in self.mapping)
        layouts = ", ".join(layout.name for layout in self.layouts.values())
        return "\n".join([f"{layouts}:", *(f"  {source:<{width}}  {target}" for source, target in self.mapping)])


def plan_conversion(
    tensors: Tensors, source_config: Mapping[str, Any] = {}, image_size: int | None = None
) -> ConversionPlan:
    """Recognise the layouts, derive the configuration and map every tensor; return the plan.

    Args:
        tensors: the source's weights by name.
        source_config: the source's configuration; its sizes must agree with the tensors.
        image_size: side of the images in pixels to resize the position table for; unchanged when None.

    Raises:
        ConversionError: if no layout is known, tensors are missing, left over or of a wrong shape, or the configuration
            contradicts them; the message names them.
    """
    tensors = remove_wrapper_prefix(tensors)
    names = list(tensors)
    towers: dict[str, TowerLayout] = {}
    for layout in LAYOUTS:
        prefix = layout.prefix(names)
        if prefix is not None and layout.tower not in towers:
            towers[layout.tower] = (layout, prefix)
    family = family_of(names, source_config)
    if not towers and family is not None:
        raise ConversionError(f"These weights are {family}. bifocal convert takes jina-clip-v1, JinaBERT v2 and EVA02.")
    if not towers:
        raise ConversionError(
            f"These {len(names)} tensors match no known layout ({', '.join(layout.name for layout in LAYOUTS)}). The "
            f"first is '{names[0] if names else ''}'."
        )
    both = len(towers) == 2
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
    return ConversionPlan({tower: layout for tower, (layout, _) in towers.items()}, mapping, config, converted)


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
                target if shared else own + target: part.clone()
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
    if not isinstance(vision, BifocalVisionConfig) or image_size % vision.patch_size:
        raise ConversionError(
            f"Images of {image_size} pixels do not fit these weights. Give a multiple of the patch size."
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


def save_converted(model: Any, source: str, out: Path) -> list[str]:
    """Write a converted model, with a processor if the source has a tokenizer; return what is missing in the folder.

    A joint model with a tokenizer becomes a folder that is ready for the Hub.

    Args:
        model: as from `build_model`.
        source: Hub id, folder or file that the weights came from.
        out: folder to write.

    Raises:
        NotOursError: if `out` may not be replaced (`bifocal.files.require_replaceable`).
    """
    processor = _read_processor(source, model.config)
    if isinstance(model, BifocalModel) and processor is not None:
        export_model(model, out, processor)
        return []
    with replace_folder(out, MODEL) as scratch:
        model.save_pretrained(scratch)
        if processor is not None:
            processor.save_pretrained(scratch)
    return [] if processor is not None or isinstance(model, BifocalVisionModel) else ["tokenizer"]


def _read_processor(source: str, config: Any) -> BifocalProcessor | None:
    source = os.path.expanduser(source)
    folder = str(Path(source).parent if Path(source).is_file() else source)
    if Path(folder).exists() and not (Path(folder) / "tokenizer_config.json").exists():
        return None
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError):  # the source has no tokenizer, which the caller reports
        return None
    return BifocalProcessor(_read_image_processor(folder, config), tokenizer)


def _read_image_processor(folder: str, config: Any) -> Any:
    """Return an image processor of the tower's size, with the mean, deviation and interpolation that the source sets.

    Raises:
        ConversionError: if the source prepares images in another way.
    """
    path = cached_file(
        folder, "preprocessor_config.json", _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )  # fmt: skip
    settings = read_json(None if path is None else Path(path))
    resize = settings.get("resize_mode", "shortest")
    if resize != "shortest":
        raise ConversionError(
            f"The source's preprocessor_config.json says resize_mode={resize!r}, but Bifocal resizes the shorter side "
            "and crops. Its vectors would differ."
        )
    options = {}
    for ours, theirs in (("image_mean", "mean"), ("image_std", "std")):
        if (value := settings.get(ours, settings.get(theirs))) is not None:
            options[ours] = value
    resample = settings.get("resample", settings.get("interpolation"))
    if resample is not None:
        try:
            options["resample"] = Image.Resampling[resample.upper()] if isinstance(resample, str) else resample
        except KeyError:
            raise ConversionError(f"The source's interpolation '{resample}' does not exist in Pillow.") from None
    return image_processor_of_size(getattr(getattr(config, "vision_config", config), "image_size", 224), **options)
