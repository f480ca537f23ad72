"""Published weights as Bifocal models: every tensor is accounted for, or nothing is written."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bifocal.files import MODEL, replace_folder
from bifocal.hub.layouts import HEAD, LAYOUTS, Layout, Rule, Tensors
from bifocal.modeling import (
    BifocalConfig,
    BifocalModel,
    BifocalProcessor,
    BifocalTextConfig,
    BifocalTextModel,
    BifocalVisionConfig,
    BifocalVisionModel,
)

_HEAD_WIDTH = 64  # of both towers in all published sizes
# Tensors of a source that are no part of the towers we take, by pattern, with the reason.
_OTHERS = {
    r"cls\.predictions\..*": "the head of masked language modelling",
    r"lm_head\..*": "the head of masked language modelling",
    r"logit_bias": "SigLIP's bias",
}


class ConversionError(ValueError):
    """What cannot be converted, in one sentence."""


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


def read_weights(source: str, allow_pickle: bool = False) -> tuple[Tensors, dict[str, Any]]:
    """The tensors and the configuration at a Hub id, a folder or a file.

    Args:
        allow_pickle: also read `.bin`, `.pt` and `.pth`, with `weights_only=True`.

    Raises:
        ConversionError: there are none, or only pickles and these were not asked for.
    """
    path = Path(source)
    if not path.exists():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

        patterns = ["*.safetensors", "*.json", *(["*.bin", "*.pt", "*.pth"] if allow_pickle else [])]
        try:
            path = Path(snapshot_download(source, allow_patterns=patterns))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            line = str(error).strip().splitlines()[0]
            raise ConversionError(f"'{source}' is no file or folder here, nor on the Hub ({line}).") from error
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    pickled = [path] if path.suffix in (".bin", ".pt", ".pth") else []
    if path.is_dir() and not files:
        pickled = sorted(p for ending in ("bin", "pt", "pth") for p in path.glob(f"*.{ending}"))
    if pickled and not allow_pickle:
        raise ConversionError(
            f"'{pickled[0]}' is a pickle, which can run code when it is read; pass --allow-pickle if you trust it (it "
            "is read with weights_only=True)."
        )
    if not files and not pickled:
        raise ConversionError(f"'{source}' holds no weights (*.safetensors).")
    tensors: Tensors = {}
    for file in pickled or files:
        tensors |= _read(file)
    config = path / "config.json" if path.is_dir() else path.with_name("config.json")
    return tensors, json.loads(config.read_text(encoding="utf-8")) if config.exists() else {}


def _read(file: Path) -> Tensors:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        found = torch.load(file, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise ConversionError(f"'{file}' cannot be read ({str(error).splitlines()[0]}).") from error
    except Exception as error:  # pickle has errors of its own, and weights_only refuses with one of them
        raise ConversionError(f"'{file}' holds more than weights, and is not read.") from error
    while isinstance(found, Mapping) and not all(isinstance(value, torch.Tensor) for value in found.values()):
        inner = next((found[name] for name in ("state_dict", "module", "model") if name in found), None)
        if inner is None:
            raise ConversionError(f"'{file}' holds no state dict of tensors.")
        found = inner
    return dict(found)


def plan_conversion(tensors: Tensors, source_config: Mapping[str, Any] = {}, image_size: int | None = None) -> Plan:
    """Recognise the layouts, derive the configuration from the tensors, and map every one of them.

    Args:
        source_config: of the source; what it says of sizes must agree with the tensors.
        image_size: resize the position table for pictures of this size.

    Raises:
        ConversionError: no known layout; tensors that are missing, left over or of a wrong shape, with their names; or
            a configuration that contradicts them.
    """
    names = list(tensors)
    found = {}
    for layout in LAYOUTS:
        prefix = layout.prefix(names)
        if prefix is not None and layout.tower not in found:
            found[layout.tower] = (layout, prefix)
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
        mapping.append((name, ", ".join(place)))
    if left:
        raise ConversionError(f"{len(left)} tensors are left over: {_some(left)}.")
    try:
        config = _config(made, found, both, source_config)
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


def _config(made: Tensors, found: Found, both: bool, source: Mapping[str, Any]) -> Any:
    text = vision = None
    if "text" in found:
        own = "text_model." if both else ""
        words = _need(made, f"{own}embeddings.word_embeddings.weight")
        width = words.shape[1]
        settings = source.get("text_config", source) if both else source
        text = BifocalTextConfig(
            vocab_size=words.shape[0], hidden_size=width, num_hidden_layers=_layers(made, own),
            num_attention_heads=_heads(width, settings, "text"),
            intermediate_size=_need(made, f"{own}layers.0.mlp.gate_up_proj.weight").shape[0] // 2,
            type_vocab_size=_need(made, f"{own}embeddings.token_type_embeddings.weight").shape[0],
            max_position_embeddings=int(settings.get("max_position_embeddings", 8192)),
            pad_token_id=settings.get("pad_token_id", 0),
        )  # fmt: skip
        _agree(settings, text, "text")
    if "vision" in found:
        own = "vision_model." if both else ""
        patches = _need(made, f"{own}embeddings.patch_embedding.weight")
        places = _need(made, f"{own}embeddings.position_embedding")
        width, patch = patches.shape[0], patches.shape[-1]
        grid = math.isqrt(places.shape[1] - 1)
        if places.ndim != 3 or grid * grid != places.shape[1] - 1:
            raise ConversionError(
                f"The position table has {places.shape[1]} rows, which is no square and a class token."
            )
        settings = source.get("vision_config", {}) if both else source
        reference = found["vision"][0].rope_reference
        vision = BifocalVisionConfig(
            hidden_size=width, num_hidden_layers=_layers(made, own), num_channels=patches.shape[1],
            num_attention_heads=_heads(width, settings, "vision"), patch_size=patch, image_size=grid * patch,
            intermediate_size=_need(made, f"{own}layers.0.mlp.gate_proj.weight").shape[0],
            # jina-clip-v1 counts positions in its own grid, EVA02-CLIP and timm in one of 16.
            rope_reference_grid=grid if both else reference,
        )  # fmt: skip
        _agree(settings, vision, "vision")
    if not both:
        return text or vision
    assert text is not None and vision is not None  # noqa: PT018
    shared = made.get("vision_projection.weight")
    return BifocalConfig(
        text_config=text, vision_config=vision, text_projection=False, vision_projection=shared is not None,
        projection_dim=text.hidden_size if shared is None else shared.shape[0],
    )  # fmt: skip


def _heads(width: int, settings: Mapping[str, Any], tower: str) -> int:
    given = settings.get("num_attention_heads")
    if given is None and width % _HEAD_WIDTH:
        raise ConversionError(f"The {tower} tower is {width} wide, and its number of heads is nowhere said.")
    return int(given) if given is not None else width // _HEAD_WIDTH


def _layers(made: Tensors, own: str) -> int:
    numbers = {int(m.group(1)) for name in made if (m := re.match(re.escape(own) + r"layers\.(\d+)\.", name))}
    return max(numbers, default=-1) + 1


def _need(made: Tensors, name: str) -> torch.Tensor:
    if name not in made:
        raise ConversionError(f"1 tensor is missing: what '{name}' is made of.")
    return made[name]


def _agree(settings: Mapping[str, Any], config: Any, tower: str) -> None:
    for key in ("hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size", "patch_size", "image_size"):
        said = settings.get(key)
        if isinstance(said, int) and hasattr(config, key) and said != getattr(config, key):
            found = getattr(config, key)
            raise ConversionError(
                f"The source's configuration says {key}={said} of the {tower} tower, its tensors {found}."
            )


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
    from transformers.models.clip import CLIPImageProcessorPil

    vision = getattr(config, "vision_config", config)
    side = getattr(vision, "image_size", 224)
    images = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    folder = Path(source).parent if Path(source).is_file() else source
    if Path(folder).exists() and not (Path(folder) / "tokenizer_config.json").exists():
        return None
    try:
        return BifocalProcessor(images, AutoTokenizer.from_pretrained(folder, trust_remote_code=False))
    except (OSError, ValueError):  # no tokenizer there; said by the caller
        return None
