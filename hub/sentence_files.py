"""The files with which sentence-transformers loads a Bifocal model, without a module of our own."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

# The methods of the model that sentence-transformers 6 calls for each kind of input.
MODALITIES = {
    "text": {"method": "get_text_features", "method_output_name": "pooler_output"},
    "image": {"method": "get_image_features", "method_output_name": "pooler_output"},
}


def as_sentence_transformer(folder: Path, prompts: Mapping[str, str] = {}) -> Any:
    """Return the model in a folder as a `SentenceTransformer` that gives unit vectors.

    Args:
        folder: folder of the model.
        prompts: texts that go before a text, by name; "query" and "document" are those that `encode_query` and
            `encode_document` use.
    """
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Transformer

    tower = Transformer(str(folder), modality_config=MODALITIES, module_output_name="sentence_embedding")
    return SentenceTransformer(modules=[tower, Normalize()], device="cpu", prompts=dict(prompts) or None)


def save_sentence_files(sentences: Any, folder: Path, model: Any, max_shard_size: str | int) -> None:
    """Write sentence-transformers' files into a model's folder; weights in shards stay in shards.

    Args:
        sentences: as from `as_sentence_transformer`.
        folder: folder of the model.
        model: the model in it.
        max_shard_size: largest size of a weights file.
    """
    sharded = (folder / "model.safetensors.index.json").exists()
    sentences.save_pretrained(str(folder), create_model_card=False)
    if sharded:  # sentence-transformers has replaced the shards by one file
        (folder / "model.safetensors").unlink()
        model.save_pretrained(folder, max_shard_size=max_shard_size)
