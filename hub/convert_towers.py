"""Other families' weights as joint models: a whole dual encoder of transformers, or one text and one image tower.

transformers loads the weights. Every tensor of their files is then found again among the model's weights by its
numbers, or its reason to be skipped is known; otherwise nothing is written.
"""

import inspect
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image
from transformers import CONFIG_MAPPING

from bifocal.errors import closest_name, first_line
from bifocal.hub.accounting import account_for, first_names
from bifocal.hub.card import Card
from bifocal.hub.checkpoint_files import ConversionError, loaded_files, local_copy, read_json
from bifocal.hub.convert import build_model, plan_conversion
from bifocal.hub.export import export_model
from bifocal.hub.source_card import SourceCard, as_data, common_license, read_source_card
from bifocal.hub.source_files import read_image_processor, read_licence, read_processor
from bifocal.hub.weights import read_tensors
from bifocal.modeling import BifocalConfig, BifocalModel
from bifocal.progress import no_progress_bars

# New weights of a joined model.
_NEW = r"(text|vision)_projection\..*|logit_(scale|bias)"
_FIXED_KEYS = ("self", "kwargs", "text_config", "vision_config")


@dataclass
class JoinedModel:
    """A model made of other weights, with an account of all their tensors.

    Args:
        model: the joint model, with its processor.
        sources: name and licence of each source.
        mappings: for each source, its tensors' names with the model's names or the reason to skip them.
        new: weights of the model that are in no source.
    """

    model: Any
    sources: list[SourceCard]
    mappings: list[dict[str, str]]
    new: list[str]

    def text(self) -> str:
        """Return the account as lines, for a dry run."""
        lines: list[str] = []
        for source, mapping in zip(self.sources, self.mappings, strict=True):
            width = max(map(len, mapping))
            lines += [f"{source.text()}:", *(f"  {name:<{width}}  {target}" for name, target in mapping.items())]
        return "\n".join([*lines, *(["new weights:", *(f"  {name}" for name in self.new)] if self.new else [])])

    def summary(self) -> str:
        """Return how many tensors of each source were used, in a few lines."""
        lines = []
        for source, mapping in zip(self.sources, self.mappings, strict=True):
            skipped = sum(target.startswith("skipped: ") for target in mapping.values())
            lines.append(f"{source.text()}: {len(mapping) - skipped} tensors used, {skipped} skipped.")
        heads = sorted({name.split(".")[0] for name in self.new if "projection" in name})
        if heads:
            lines.append(f"New and untrained: {', '.join(heads)}. Train the model before you use it across modalities.")
        return "\n".join(lines)

    def save(self, out: Path) -> None:
        """Export the model into a folder.

        Raises:
            NotOursError: if `out` may not be replaced (`bifocal.files.require_replaceable`).
        """
        names = [source.name for source in self.sources]
        description = f"The weights of {names[0]} as a Bifocal model."
        if len(names) == 2:
            description = (
                f"A Bifocal model of two towers: {names[0]} for texts and {names[1]} for images. It is not trained, "
                "so texts and images do not match each other."
            )
        card = Card(
            description=description,
            license=common_license(self.sources),
            sources=as_data(self.sources),
        )
        export_model(self.model, out, self.model.processor, card)


def is_dual_encoder(config: Mapping[str, Any]) -> bool:
    """Return whether a config.json is that of a whole dual encoder of transformers."""
    kind = str(config.get("model_type"))
    if kind not in CONFIG_MAPPING or kind == BifocalConfig.model_type:
        return False
    return {"text_config", "vision_config"} <= set(CONFIG_MAPPING[kind].sub_configs)


@contextmanager
def explain_tower(source: str, config: Mapping[str, Any]) -> Iterator[None]:
    """Replace a `ConversionError` on one tower of transformers by one that says how towers are joined.

    Args:
        source: Hub id, folder or file.
        config: content of its config.json.
    """
    try:
        yield
    except ConversionError as error:
        kind = str(config.get("model_type"))
        # JinaBERT says it is a BERT, but has code of its own.
        if kind not in CONFIG_MAPPING or kind.startswith(BifocalConfig.model_type) or "auto_map" in config:
            raise
        raise ConversionError(
            f"'{source}' is one tower ({kind}). Join it with another one by --text and --image."
        ) from error


def _parse_settings(pairs: Iterable[str]) -> dict[str, Any]:
    """Return settings of the joint model's configuration, given as key=value; the values are YAML.

    Raises:
        ConversionError: if a pair is not key=value, or there is no such key.
    """
    known = [key for key in inspect.signature(BifocalConfig.__init__).parameters if key not in _FIXED_KEYS]
    settings: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise ConversionError(f"'{pair}' is not key=value, such as projection_dim=512.")
        if key not in known:
            near = closest_name(key, known)
            hint = f"Did you mean '{near}'?" if near else f"There are {', '.join(known)}."
            raise ConversionError(f"The configuration of a Bifocal model has no '{key}'. {hint}")
        try:
            settings[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ConversionError(f"The value of '{key}' is not valid YAML ({first_line(error)}).") from error
    return settings


def convert_dual_encoder(source: str, settings: Sequence[str] = (), allow_pickle: bool = False) -> JoinedModel:
    """Return a whole dual encoder of transformers as a joint model.

    Args:
        source: Hub id or folder.
        settings: keys of the joint model's configuration that override the family's, as key=value.
        allow_pickle: whether to read pickles, too.

    Raises:
        ConversionError: if its family is not supported, weights are missing, or a tensor is used by nothing.
    """
    changes = _parse_settings(settings)
    folder = local_copy(source, allow_pickle)
    tensors = read_tensors(loaded_files(folder, source, allow_pickle))
    try:
        with no_progress_bars():
            model = BifocalModel.from_pretrained(folder, **changes)
    except (OSError, ValueError) as error:
        raise _conversion_error(error, {folder: source}) from error
    mapping, new = account_for(tensors, model.state_dict(), source)
    _require_vectors(model)
    if new:
        raise ConversionError(first_names(new, f"weights of the model are in no tensor of '{source}'"))
    return JoinedModel(model, [read_source_card(source, folder)], [mapping], [])


def join_towers(text: str, image: str, settings: Sequence[str] = (), allow_pickle: bool = False) -> JoinedModel:
    """Return a joint model of two towers.

    Args:
        text, image: Hub id, folder, or weights that `bifocal convert` takes alone, such as JinaBERT v2 or EVA02.
        settings: keys of the joint model's configuration, as key=value.
        allow_pickle: whether to read pickles, too.

    Raises:
        ConversionError: if one is no tower of its kind, the settings do not fit, or a tensor is used by nothing.
    """
    changes = _parse_settings(settings)
    with ExitStack() as stack:
        towers = {
            "text": _Tower(text, "text", allow_pickle, stack),
            "image": _Tower(image, "image", allow_pickle, stack),
        }
        names = {tower.folder: tower.source for tower in towers.values()}
        try:
            with no_progress_bars():
                model = BifocalModel.from_towers(*(tower.folder for tower in towers.values()), **changes)
        except (OSError, ValueError) as error:
            raise _conversion_error(error, names) from error
    _require_vectors(model)
    weights = model.state_dict()
    mappings = []
    for kind, tower in towers.items():
        own = ("text_model.", "text_projection.") if kind == "text" else ("vision_model.",)
        candidates = {name: value for name, value in weights.items() if name.startswith(own)}
        mapping, left = account_for(tower.tensors, candidates, tower.source, kind)
        if missing := [name for name in left if not re.fullmatch(_NEW, name)]:
            raise ConversionError(first_names(missing, f"weights of the model are in no tensor of '{tower.source}'"))
        mappings.append(tower.of_source(mapping))
        weights = {name: value for name, value in weights.items() if name not in candidates or name in left}
    return JoinedModel(model, [tower.card for tower in towers.values()], mappings, list(weights))


def _require_vectors(model: Any) -> None:
    """Check that a model embeds a text and an image.

    Raises:
        ConversionError: if it does not, for example because it has no pooled output, or gives numbers that are not
            finite.
    """
    try:
        vectors = [model.encode_text("a red circle"), model.encode_image(Image.new("RGB", (64, 48)))]
    except ValueError as error:
        raise ConversionError(str(error)) from error
    except (TypeError, RuntimeError, IndexError) as error:
        raise ConversionError(f"The towers cannot embed a text and an image ({first_line(error)}).") from error
    if not all(np.isfinite(vector).all() for vector in vectors):
        raise ConversionError("The model gives vectors that are not finite, so nothing is written. Give other weights.")


class _Tower:
    """A source of one tower, as a folder that `BifocalModel.from_towers` takes.

    Weights in a layout that `bifocal convert` takes alone are converted into a temporary folder first.
    """

    def __init__(self, source: str, kind: str, allow_pickle: bool, stack: ExitStack) -> None:
        path = local_copy(source, allow_pickle)
        self.source = source
        self.folder = path if path.is_dir() else path.parent
        self.card = read_source_card(source, self.folder)
        files = loaded_files(path, source, allow_pickle)
        self.tensors = read_tensors(files)
        self.converted: dict[str, str] = {}
        config = read_json((files[0].parent if files else self.folder) / "config.json")
        try:
            plan = plan_conversion(self.tensors, config)
        except ConversionError as error:
            kind_of_model = config.get("model_type")
            if kind_of_model in CONFIG_MAPPING:
                return
            if kind_of_model is None or "auto_map" in config:
                raise
            raise ConversionError(
                f"'{source}' is of the family '{kind_of_model}', which this version of transformers does not know. "
                "Give another model."
            ) from error
        target = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        build_model(plan).save_pretrained(target)
        self.card = replace(self.card, license=read_licence(source, plan.layouts))
        self.converted = dict(plan.mapping)
        self.tensors = dict(plan.tensors)
        self._save_processor(kind, target, plan.config)
        self.folder = target

    def _save_processor(self, kind: str, target: Path, config: Any) -> None:
        if kind == "image" and not isinstance(config, BifocalConfig):
            read_image_processor(str(self.folder), config).save_pretrained(target)
            return
        processor = read_processor(str(self.folder), config)
        if processor is None:
            raise ConversionError(f"'{self.source}' has no tokenizer. Give a folder with one.")
        (processor if isinstance(config, BifocalConfig) else processor.tokenizer).save_pretrained(target)

    def of_source(self, mapping: dict[str, str]) -> dict[str, str]:
        """Return a mapping of the source's own names, for one of the converted names."""
        if not self.converted:
            return mapping
        return {
            name: ", ".join(mapping.get(target, target) for target in targets.split(", "))
            for name, targets in self.converted.items()
        }


def _conversion_error(error: Exception, names: Mapping[Path, str]) -> ConversionError:
    """Return an error of loading with the sources' names as the user gave them."""
    message = first_line(error)
    for folder, name in names.items():
        message = message.replace(str(folder), name)
    return ConversionError(message if message.endswith("?") else f"{message}.")
