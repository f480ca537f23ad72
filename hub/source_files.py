"""Reads a source's tokenizer, image processing and licence: its tokenizer, how it prepares images, and its licence."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import metadata_load
from PIL import Image
from transformers import CONFIG_MAPPING, AutoTokenizer, PreTrainedConfig
from transformers.utils import cached_file

from bifocal.hub.checkpoint_files import ConversionError, read_json
from bifocal.hub.weight_layouts import XLM_R_FLASH, WeightLayout
from bifocal.modeling import BifocalProcessor
from bifocal.modeling.processing_bifocal import image_processor_of_size

_JINA_CLIP_V2_LICENCE = "cc-by-nc-4.0"


def read_licence(source: str, layouts: Mapping[str, WeightLayout]) -> str | None:
    """Return the licence of a source's weights by its name on the Hub; None if it is not known.

    It is the one in the metadata of the source's README.md, or else that of jina-clip-v2 for weights in its layout.

    Args:
        source: Hub id, folder or file of the weights.
        layouts: layout of each tower in the source.
    """
    licence = licence_on_card(local_path(_folder_of(source), "README.md"))
    return _JINA_CLIP_V2_LICENCE if licence is None and layouts.get("text") is XLM_R_FLASH else licence


def licence_on_card(path: Path | None) -> str | None:
    """Return the licence in the metadata of a README.md, as "other (name)" if it is not one of the Hub's; or None."""
    try:
        metadata = (metadata_load(path) or {}) if path is not None and path.exists() else {}
    except (yaml.YAMLError, ValueError):  # no metadata that can be read
        return None
    licence = metadata.get("license")
    if licence == "other" and metadata.get("license_name"):
        licence = f"other ({metadata['license_name']})"
    return licence if isinstance(licence, str) else None


def _folder_of(source: str) -> str:
    """Return the folder or Hub id of a source that may be a file."""
    source = os.path.expanduser(source)
    return str(Path(source).parent if Path(source).is_file() else source)


def local_path(folder: str, name: str) -> Path | None:
    """Return the local path of a file in a folder or on the Hub; None if there is none."""
    path = cached_file(
        folder, name, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False
    )
    return None if path is None else Path(path)


def read_processor(source: str, config: Any) -> BifocalProcessor | None:
    """Return the processor of a source; None if it has no tokenizer.

    Args:
        source: Hub id, folder or file of the weights.
        config: configuration of the Bifocal model.

    Raises:
        ConversionError: if the source prepares images in another way than Bifocal.
    """
    folder = _folder_of(source)
    if Path(folder).exists() and not (Path(folder) / "tokenizer_config.json").exists():
        return None
    kind = read_json(local_path(folder, "config.json")).get("model_type")
    # Of a model_type that it does not know, transformers warns, but it needs none to find the tokenizer.
    options = {} if kind is None or kind in CONFIG_MAPPING else {"config": PreTrainedConfig()}
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **options)
    except (OSError, ValueError):  # the source has no tokenizer, which the caller reports
        return None
    return BifocalProcessor(read_image_processor(folder, config), tokenizer)


def read_image_processor(folder: str, config: Any) -> Any:
    """Return an image processor of the tower's size, with the mean, deviation and interpolation that the source sets.

    Raises:
        ConversionError: if the source prepares images in another way.
    """
    settings = read_json(local_path(folder, "preprocessor_config.json"))
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
