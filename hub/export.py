"""A folder that is ready for the Hub: weights, code, tokenizer, processor, sentence-transformers' files and a card."""

import copy
import json
from dataclasses import asdict
from pathlib import Path

from bifocal.hub.card import Card, TrainedStage, write_card
from bifocal.hub.folders import made_whole, require_replaceable
from bifocal.modeling import BifocalModel, BifocalProcessor

FACTS = "card.json"  # what the card was made of, so that it can be written again
SHARD = "2GB"
# sentence-transformers 6 calls these methods of the model by the kind of input: no module code of ours is needed.
MODALITIES = {
    "text": {"method": "get_text_features", "method_output_name": "pooler_output"},
    "image": {"method": "get_image_features", "method_output_name": "pooler_output"},
}


def export_model(
    model: BifocalModel,
    folder: str | Path,
    processor: BifocalProcessor | None = None,
    card: Card | None = None,
    shard: str = SHARD,
) -> Path:
    """Write a Hub-ready folder that AutoModel, AutoProcessor and SentenceTransformer load.

    The folder is made beside its place and moved there whole, so that it is never half written. An earlier export
    there is replaced.

    Args:
        processor: `model.processor` when None.
        card: what its model card says.
        shard: largest size of a file of weights, such as "2GB".

    Returns:
        The folder.

    Raises:
        FileExistsError: something that is no model is there; it is left alone.
    """
    folder = Path(folder)
    card = card or Card()
    processor = processor or model.processor
    processor = with_limit(processor, model)
    require_replaceable(folder)
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Transformer

    with made_whole(folder) as made:
        model.save_pretrained(made, max_shard_size=shard)
        sharded = (made / "model.safetensors.index.json").exists()
        processor.save_pretrained(made)
        tower = Transformer(str(made), modality_config=MODALITIES, module_output_name="sentence_embedding")
        SentenceTransformer(modules=[tower, Normalize()], device="cpu").save_pretrained(
            str(made), create_model_card=False
        )
        if sharded:  # sentence-transformers has put one file in the place of the shards
            (made / "model.safetensors").unlink()
            model.save_pretrained(made, max_shard_size=shard)
        (made / FACTS).write_text(json.dumps(asdict(card), indent=2) + "\n", encoding="utf-8")
        write_card(made / "README.md", card, card.name or folder.name, model, processor.tokenizer.model_max_length)
    return folder


def with_limit(processor: BifocalProcessor, model: BifocalModel) -> BifocalProcessor:
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
