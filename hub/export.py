"""A folder that is ready for the Hub: weights, code, tokenizer, processor, sentence-transformers' files and a card."""

import os
import shutil
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path

from bifocal.modeling import BifocalModel, BifocalProcessor

# sentence-transformers 6 calls these methods of the model by the kind of input: no module code of ours is needed.
MODALITIES = {
    "text": {"method": "get_text_features", "method_output_name": "pooler_output"},
    "image": {"method": "get_image_features", "method_output_name": "pooler_output"},
}


@dataclass
class Card:
    """What a model card says that the model itself does not.

    Args:
        name: the repository, "organisation/model"; the folder's name when None.
        description: what the model is and is made for.
        metrics: value by name.
        protocol: on what the metrics were measured, and how.
        license: as the Hub names it, such as "apache-2.0".
    """

    name: str | None = None
    description: str = "A Bifocal model."
    metrics: dict[str, float] = field(default_factory=dict)
    protocol: str = ""
    license: str | None = None


def export_model(
    model: BifocalModel, folder: str | Path, processor: BifocalProcessor | None = None, card: Card | None = None
) -> Path:
    """Write a Hub-ready folder that AutoModel, AutoProcessor and SentenceTransformer load.

    The folder is made beside its place and moved there whole, so that it is never half written. An earlier export
    there is replaced.

    Args:
        processor: `model.processor` when None.

    Returns:
        The folder.

    Raises:
        FileExistsError: something that is no model is there; it is left alone.
    """
    folder = Path(folder)
    card = card or Card()
    processor = processor or model.processor
    if folder.exists() and not (folder / "config.json").exists() and not _is_empty(folder):
        raise FileExistsError(f"'{folder}' holds something that is no model; choose another folder or remove it.")
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Transformer

    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        made = scratch / folder.name
        model.save_pretrained(made)
        processor.save_pretrained(made)
        tower = Transformer(str(made), modality_config=MODALITIES, module_output_name="sentence_embedding")
        SentenceTransformer(modules=[tower, Normalize()], device="cpu").save_pretrained(
            str(made), create_model_card=False
        )
        _write_card(made / "README.md", card, card.name or folder.name, model.config.projection_dim)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(made, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def _is_empty(folder: Path) -> bool:
    return folder.is_dir() and not any(folder.iterdir())


def _write_card(path: Path, card: Card, name: str, dimensions: int) -> None:
    from huggingface_hub import ModelCard, ModelCardData

    data = ModelCardData(
        library_name="sentence-transformers",
        pipeline_tag="sentence-similarity",
        tags=["bifocal", "clip", "image-text-retrieval", "sentence-transformers", "feature-extraction"],
        license=card.license,
        language="en",
    )
    values = asdict(card) | {"name": name, "dimensions": dimensions}
    template = Path(__file__).parent / "templates" / "card.md.j2"
    ModelCard.from_template(data, template_path=str(template), **values).save(str(path))
