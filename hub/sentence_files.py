"""The files by which sentence-transformers loads a dual encoder of transformers, without a module of our own."""

from pathlib import Path
from typing import Any

# sentence-transformers 6 calls these methods of the model by the kind of input.
MODALITIES = {
    "text": {"method": "get_text_features", "method_output_name": "pooler_output"},
    "image": {"method": "get_image_features", "method_output_name": "pooler_output"},
}


def as_sentence_transformer(folder: Path, **options: Any) -> Any:
    """Return the model in a folder as a `SentenceTransformer` of unit vectors; `options` are its first module's."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Transformer

    tower = Transformer(str(folder), modality_config=MODALITIES, module_output_name="sentence_embedding", **options)
    return SentenceTransformer(modules=[tower, Normalize()], device="cpu")


def save_sentence_files(sentences: Any, folder: Path, model: Any, shard: str) -> None:
    """Write its files into the folder that it was loaded from; the weights stay in shards where they are in shards."""
    sharded = (folder / "model.safetensors.index.json").exists()
    sentences.save_pretrained(str(folder), create_model_card=False)
    if sharded:  # it has put one file in the place of the shards
        (folder / "model.safetensors").unlink()
        model.save_pretrained(folder, max_shard_size=shard)
