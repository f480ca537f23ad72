"""Exports transformers' other dual encoders, CLIP and SigLIP, with a model card of their own."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bifocal.hub.card import Card
from bifocal.hub.sample_images import sample_pairs
from bifocal.hub.sentence_files import as_sentence_transformer, save_sentence_files

_LOWEST_COSINE = 0.999  # to the model's own vectors, below which sentence-transformers reads the folder differently


def finish_other_model(
    model: Any, folder: Path, processor: Any, card: Card, name: str, max_shard_size: str | int
) -> None:
    """Add sentence-transformers' files and a card to the folder of another family's model.

    sentence-transformers' files are written only if that library gives the model's own vectors for sample texts and
    images. Otherwise the card shows no code for it.
    """
    # SigLIP was trained on texts padded to their full length, and attends to the padding.
    full_length = "siglip" in model.config.model_type
    texts, images = zip(*list(sample_pairs())[:3])
    texts = (*texts, "a small drawing of a shape in one colour on a white ground")
    text_vectors, image_vectors = _encode(model, processor, list(texts), list(images), full_length)
    options = {"processing_kwargs": {"text": {"padding": "max_length"}}} if full_length else {}
    sentences = as_sentence_transformer(folder, **options)
    agrees = _agrees(sentences, texts, text_vectors) and _agrees(sentences, images, image_vectors)
    if agrees:
        save_sentence_files(sentences, folder, model, max_shard_size)
    _write_card(folder, card, name, model, processor, full_length, agrees, text_vectors.shape[1])


def _encode(
    model: Any, processor: Any, texts: list[str], images: list[Any], full_length: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Return unit vectors of texts and of images, (number, dimensions) each."""
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            words = processor(
                text=texts, padding="max_length" if full_length else True, truncation=True, return_tensors="pt"
            )
            mask = {} if full_length else {"attention_mask": words["attention_mask"].to(model.device)}
            features = [
                model.get_text_features(input_ids=words["input_ids"].to(model.device), **mask),
                model.get_image_features(
                    pixel_values=processor(images=images, return_tensors="pt")["pixel_values"].to(
                        model.device, model.dtype
                    )
                ),
            ]
    finally:
        model.train(was_training)
    units = [torch.nn.functional.normalize(output.pooler_output.float(), dim=-1).cpu().numpy() for output in features]
    return units[0], units[1]


def _agrees(sentences: Any, items: Sequence[Any], expected: np.ndarray) -> bool:
    vectors = np.asarray(sentences.encode(list(items), show_progress_bar=False), dtype=np.float32)
    return vectors.shape == expected.shape and float((vectors * expected).sum(axis=1).min()) >= _LOWEST_COSINE


def _write_card(
    folder: Path, card: Card, name: str, model: Any, processor: Any, full_length: bool, sentences: bool, dimensions: int
) -> None:
    from huggingface_hub import ModelCard, ModelCardData

    library = "sentence-transformers" if sentences else "transformers"
    data = ModelCardData(
        library_name=library,
        pipeline_tag="sentence-similarity" if sentences else "zero-shot-image-classification",
        tags=["image-text-retrieval", "feature-extraction", *(["sentence-transformers"] if sentences else [])],
        license=card.license,
    )
    default = Card().description
    text = ModelCard.from_template(
        data,
        template_path=str(Path(__file__).parent / "templates" / "other_card.md.j2"),
        name=name,
        family=type(model).__name__,
        description=card.description if card.description != default else "",
        metrics=card.metrics,
        protocol=card.protocol,
        dimensions=dimensions,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        tokens=model.config.text_config.max_position_embeddings,
        pixels=model.config.vision_config.image_size,
        remote_code=type(processor).__module__.startswith("bifocal."),
        full_length=full_length,
        sentences=sentences,
    )
    ModelCard(re.sub(r"\n{3,}", "\n\n", str(text))).save(str(folder / "README.md"))
