"""A folder that is ready for the Hub: weights, code, tokenizer, processor, sentence-transformers' files and a card."""

import copy
import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers.utils import logging

from bifocal.files import MODEL, parts, replace_folder
from bifocal.hub.card import Card, TrainedStage, write_card
from bifocal.hub.other_families import finish_other_model
from bifocal.hub.sentence_files import as_sentence_transformer, save_sentence_files
from bifocal.modeling import BifocalProcessor
from bifocal.progress import no_progress_bars

logger = logging.get_logger(__name__)
FACTS = "card.json"  # what the card was made of, so that it can be written again
SHARD = "2GB"


def export_model(
    model: Any,
    folder: str | Path,
    processor: BifocalProcessor | None = None,
    card: Card | None = None,
    shard: str = SHARD,
    kind: str = MODEL,
) -> Path:
    """Write a Hub-ready folder that AutoModel, AutoProcessor and SentenceTransformer load, and return its path.

    The folder is written whole or not at all. An earlier export there is replaced if nobody changed it. The adapters of
    a peft model are merged into the weights of a copy, so that its training can continue.

    Args:
        model: a [`BifocalModel`], such a model with peft's adapters, or transformers' CLIP or SigLIP.
        processor: `model.processor` when None.
        card: what its model card says.
        shard: largest size of a file of weights, such as "2GB".
        kind: what the folder is called in the list of its files; only folders of the same kind are replaced.

    Raises:
        NotOursError: if the folder may not be replaced (`bifocal.files.require_replaceable`); it is left alone.
        ValueError: if the size is no size, the model embeds no texts and images into one space, its adapters cannot be
            merged, or there is no processor.
    """
    require_size(shard)
    folder = Path(folder).expanduser()
    before = parts(folder)
    with replace_folder(folder, kind) as made:
        model, processor = _ready(model, processor)
        write_model(model, made, processor, card or Card(), shard)
    if before:
        gone = left_out(before, folder)
        if gone:
            logger.warning(f"'{folder}' no longer has {gone}, which the earlier export had.")
    return folder


def require_size(shard: str | int) -> None:
    """
    Raises:
        ValueError: if this is no size of a file of weights.
    """
    number = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:[KMGT]B)", str(shard).strip(), re.IGNORECASE)
    if not (number and float(number[1]) > 0) and not (isinstance(shard, int) and shard > 0):
        raise ValueError(f"'{shard}' is no size of a file; write a number with KB, MB, GB or TB, such as {SHARD}.")


def left_out(before: set[str], folder: Path) -> str:
    """Name the parts that a folder had and no longer has, weights aside, since these depend on the size of a file."""
    gone = sorted(part for part in before - parts(folder) if ".safetensors" not in part)
    return ", ".join(gone)


def _ready(model: Any, processor: Any) -> tuple[Any, Any]:
    """The model with its adapters merged, and its processor."""
    if hasattr(model, "peft_config") and hasattr(model, "merge_and_unload"):
        processor = processor or getattr(model, "processor", None)
        model = copy.deepcopy(model).merge_and_unload()
    elif hasattr(model, "peft_config"):
        kinds = ", ".join(str(getattr(one.peft_type, "value", one.peft_type)) for one in model.peft_config.values())
        raise ValueError(f"peft cannot merge {kinds} into the weights; save the adapter alone with save_pretrained.")
    elif getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(
            "Adapters that were added with add_adapter cannot be merged; wrap the model with peft.get_peft_model, or "
            "save the adapter alone with save_pretrained."
        )
    if not hasattr(model, "get_text_features") or not hasattr(model, "get_image_features"):
        raise ValueError(
            f"A {type(model).__name__} does not embed texts and images into one space, so it has no model card here; "
            "write it with save_pretrained."
        )
    processor = processor or getattr(model, "processor", None)
    if processor is None:
        raise ValueError(f"This {type(model).__name__} has no processor; pass processor=.")
    return model, processor


def write_model(model: Any, folder: Path, processor: Any, card: Card, shard: str = SHARD) -> None:
    """Write a model, its processor, sentence-transformers' files and its card into a new folder."""
    with no_progress_bars():
        _write_model(model, folder, processor, card, shard)


def _write_model(model: Any, folder: Path, processor: Any, card: Card, shard: str) -> None:
    name = card.name or folder.name
    if model.config.model_type == "bifocal":
        processor = with_limit(processor, model)
    model.save_pretrained(folder, max_shard_size=shard)
    processor.save_pretrained(folder)
    if model.config.model_type != "bifocal":
        finish_other_model(model, folder, processor, card, name, shard)
        return
    save_sentence_files(as_sentence_transformer(folder), folder, model, shard)
    (folder / FACTS).write_text(json.dumps(asdict(card), indent=2) + "\n", encoding="utf-8")
    write_card(folder / "README.md", card, name, model, processor.tokenizer.model_max_length)


def with_limit(processor: Any, model: Any) -> Any:
    """Return a copy of a processor that cuts texts where `model.encode_text` does.

    That is the smaller one of the tokenizer's limit and the text tower's. Other libraries know the tokenizer's alone.
    """
    processor = copy.deepcopy(processor)
    tokenizer = processor.tokenizer
    tokenizer.model_max_length = min(tokenizer.model_max_length, model.config.text_config.max_position_embeddings)
    return processor


def read_facts(folder: Path) -> Card:
    """What the card of an exported model was made of; an empty one for a folder of before there were such files."""
    path = folder / FACTS
    if not path.exists():
        return Card()
    found = json.loads(path.read_text(encoding="utf-8"))
    return Card(**{**found, "stages": [TrainedStage(**stage) for stage in found["stages"]]})
