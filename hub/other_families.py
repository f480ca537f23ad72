"""Exporting transformers' other dual encoders, CLIP and SigLIP: a folder and a card that are true for them."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bifocal.hub.card import Card
from bifocal.hub.sample_images import samples
from bifocal.hub.sentence_files import as_sentence_transformer, save_sentence_files

_LOWEST_COSINE = 0.999  # to the model's own vectors, below which sentence-transformers reads the folder differently


def finish_other_model(model: Any, folder: Path, processor: Any, card: Card, name: str, shard: str) -> None:
    """Write sentence-transformers' files and a card beside a model of another family and its processor.

    sentence-transformers' files are written only if that library makes the model's own vectors with them, which is
    tried on sample texts and images. Otherwise the card shows no code for it.
    """
    # SigLIP was trained on texts padded to their full length, and attends to the padding.
    full_length = "siglip" in model.config.model_type
    texts, pictures = zip(*list(samples())[:3])
    texts = (*texts, "a small drawing of a shape in one colour on a white ground")
    wanted = _vectors(model, processor, list(texts), list(pictures), full_length)
    options = {"processing_kwargs": {"text": {"padding": "max_length"}}} if full_length else {}
    sentences = as_sentence_transformer(folder, **options)
    agrees = _agrees(sentences, texts, wanted[0]) and _agrees(sentences, pictures, wanted[1])
    if agrees:
        save_sentence_files(sentences, folder, model, shard)
    _write_card(folder, card, name, model, processor, full_length, agrees, wanted[0].shape[1])


def _vectors(
    model: Any, processor: Any, texts: list[str], pictures: list[Any], full_length: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors of texts and of images, (number, dimensions) each."""
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            words = processor(
                text=texts, padding="max_length" if full_length else True, truncation=True, return_tensors="pt"
            )
            mask = {} if full_length else {"attention_mask": words["attention_mask"].to(model.device)}
            found = [
                model.get_text_features(input_ids=words["input_ids"].to(model.device), **mask),
                model.get_image_features(
                    pixel_values=processor(images=pictures, return_tensors="pt")["pixel_values"].to(
                        model.device, model.dtype
                    )
                ),
            ]
    finally:
        model.train(was_training)
    units = [torch.nn.functional.normalize(one.pooler_output.float(), dim=-1).cpu().numpy() for one in found]
    return units[0], units[1]


def _agrees(sentences: Any, items: Sequence[Any], wanted: np.ndarray) -> bool:
    found = np.asarray(sentences.encode(list(items), show_progress_bar=False), dtype=np.float32)
    return found.shape == wanted.shape and float((found * wanted).sum(axis=1).min()) >= _LOWEST_COSINE


def _write_card(
    folder: Path, card: Card, name: str, model: Any, processor: Any, full_length: bool, sentences: bool, dimensions: int
) -> None:
    from huggingface_hub import ModelCard, ModelCardData

    kind = "sentence-transformers" if sentences else "transformers"
    data = ModelCardData(
        library_name=kind,
        pipeline_tag="sentence-similarity" if sentences else "zero-shot-image-classification",
        tags=["image-text-retrieval", "feature-extraction", *(["sentence-transformers"] if sentences else [])],
        license=card.license,
    )
    default = Card().description
    written = ModelCard.from_template(
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
    ModelCard(re.sub(r"\n{3,}", "\n\n", str(written))).save(str(folder / "README.md"))
