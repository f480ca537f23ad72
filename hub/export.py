"""Exports a model as a folder for the Hub: weights, code, processor, sentence-transformers' files and a card."""

import copy
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers.utils import logging

from bifocal.files import MODEL, parts, replace_folder
from bifocal.hub.card import Card, TrainedStage, write_card
from bifocal.hub.export_arguments import MAX_SHARD_SIZE, ExportError, require_shard_size
from bifocal.hub.sentence_files import as_sentence_transformer, save_sentence_files
from bifocal.modeling import BifocalConfig, BifocalModel, BifocalProcessor
from bifocal.modeling.loading_bifocal import join_dual_encoder
from bifocal.progress import no_progress_bars

logger = logging.get_logger(__name__)
CARD_DATA = "card.json"  # the card's data, so that it can be written again


def export_model(
    model: Any,
    folder: str | Path,
    processor: BifocalProcessor | None = None,
    card: Card | None = None,
    max_shard_size: str | int = MAX_SHARD_SIZE,
    kind: str = MODEL,
) -> Path:
    """Write a folder that AutoModel, AutoProcessor and SentenceTransformer load, and return its path.

    The folder is written whole or not at all. An earlier export is replaced if nobody changed it. The adapters of a
    peft model are merged into the weights of a copy, so that its training can continue.

    Args:
        model: a [`BifocalModel`], such a model with peft's adapters, or a dual encoder of transformers (CLIP, SigLIP,
            ...), which is exported as a Bifocal model.
        folder: folder to write.
        processor: the model's processor; `model.processor` when None.
        card: content of the model card.
        max_shard_size: largest size of a weights file, such as "2GB".
        kind: kind of the folder in the list of its files; only folders of the same kind are replaced.

    Raises:
        NotOursError: if the folder may not be replaced (`bifocal.files.require_replaceable`).
        ExportError: if the size is not valid, the model does not embed texts and images into one space, its adapters
            cannot be merged, or it has no processor.
    """
    require_shard_size(max_shard_size)
    folder = Path(folder).expanduser()
    before = parts(folder)
    with replace_folder(folder, kind) as scratch:
        model, processor = _merge_adapters(model, processor)
        write_model(model, scratch, processor, card or Card(), max_shard_size)
    if missing := missing_parts(before, folder):
        logger.warning(f"'{folder}' no longer has {missing}, which the earlier export had.")
    return folder


def missing_parts(before: set[str], folder: Path) -> str:
    """Return the parts that a folder had and no longer has, without weights, whose files depend on the shard size."""
    return ", ".join(sorted(part for part in before - parts(folder) if ".safetensors" not in part))


def _merge_adapters(model: Any, processor: Any) -> tuple[Any, Any]:
    """Return the model with its adapters merged, and its processor."""
    if hasattr(model, "peft_config") and hasattr(model, "merge_and_unload"):
        processor = processor or getattr(model, "processor", None)
        model = copy.deepcopy(model).merge_and_unload()
    elif hasattr(model, "peft_config"):
        kinds = ", ".join(
            str(getattr(config.peft_type, "value", config.peft_type)) for config in model.peft_config.values()
        )
        raise ExportError(f"peft cannot merge {kinds} into the weights; save the adapter alone with save_pretrained.")
    elif getattr(model, "_hf_peft_config_loaded", False):
        raise ExportError(
            "Adapters that were added with add_adapter cannot be merged. Wrap the model with peft.get_peft_model, or "
            "save the adapter alone with save_pretrained."
        )
    if not hasattr(model, "get_text_features") or not hasattr(model, "get_image_features"):
        raise ExportError(
            f"A {type(model).__name__} does not embed texts and images into one space, so it has no model card here. "
            "Save it with save_pretrained."
        )
    processor = processor or getattr(model, "processor", None)
    if processor is None:
        raise ExportError(f"This {type(model).__name__} has no processor; pass processor=.")
    if not isinstance(model, BifocalModel) and model.config.model_type != BifocalConfig.model_type:
        model, processor = _as_bifocal(model, processor)
    return model, processor


def _as_bifocal(model: Any, processor: Any) -> tuple[BifocalModel, BifocalProcessor]:
    """Return a copy of a dual encoder of transformers as a Bifocal model, with its processor.

    Raises:
        ExportError: if its family is not supported.
    """
    tokenizer = copy.deepcopy(processor.tokenizer)
    tokenizer.padding_side = "right"  # as `encode_text` pads
    try:
        joined = join_dual_encoder(BifocalModel, copy.deepcopy(model), processor)
    except ValueError as error:
        raise ExportError(str(error)) from error
    joined.processor = BifocalProcessor(processor.image_processor, tokenizer)
    return joined, joined.processor


def write_model(
    model: Any, folder: Path, processor: Any, card: Card, max_shard_size: str | int = MAX_SHARD_SIZE
) -> None:
    """Write a model, its processor, sentence-transformers' files and its card into a new folder."""
    with no_progress_bars():
        _write_model(model, folder, processor, card, max_shard_size)


def _write_model(model: Any, folder: Path, processor: Any, card: Card, max_shard_size: str | int) -> None:
    name = card.name or folder.name
    processor = with_model_max_length(processor, model)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    processor.save_pretrained(folder)
    save_sentence_files(as_sentence_transformer(folder, model.config.prompts), folder, model, max_shard_size)
    (folder / CARD_DATA).write_text(json.dumps(asdict(card), indent=2) + "\n", encoding="utf-8")
    write_card(folder / "README.md", card, name, model, processor)


def with_model_max_length(processor: Any, model: Any) -> Any:
    """Return a copy of a processor that truncates texts where `model.encode_text` does, and gives a mask.

    It truncates at the smaller one of the tokenizer's limit and the model's. Other libraries only know the tokenizer's.
    SigLIP's tokenizer gives no mask by default, but other ways of padding need one.
    """
    processor = copy.deepcopy(processor)
    tokenizer = processor.tokenizer
    tokenizer.model_max_length = min(tokenizer.model_max_length, model.config.max_text_length)
    if "attention_mask" not in tokenizer.model_input_names:
        tokenizer.model_input_names = [*tokenizer.model_input_names, "attention_mask"]
        tokenizer.init_kwargs["model_input_names"] = tokenizer.model_input_names
    return processor


def read_card(folder: Path) -> Card:
    """Return the content of an exported model's card; an empty one if the folder has no card.json."""
    path = folder / CARD_DATA
    if not path.exists():
        return Card()
    content = json.loads(path.read_text(encoding="utf-8"))
    return Card(**{**content, "stages": [TrainedStage(**stage) for stage in content["stages"]]})
