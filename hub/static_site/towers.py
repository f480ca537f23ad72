"""The model of a static site: its int8 ONNX towers with tokenizer and configuration, as transformers.js reads them."""

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bifocal.hub.export import with_model_max_length
from bifocal.hub.onnx import WITHOUT_ONNX, OnnxEncoder, OnnxError, compare_vectors, export_onnx, file_name, quietly
from bifocal.hub.space import remove_paths
from bifocal.hub.static_site.arguments import SiteError
from bifocal.modeling import BifocalModel

MODEL = "model"  # folder of a site
_MAX_TOKENS = 512  # of a query; a browser takes seconds for a longer one
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
# Those whose steps images.js and transformers.js repeat pixel by pixel; others may differ.
_IMAGE_PROCESSORS = ("CLIPImageProcessor", "SiglipImageProcessor", "ViTImageProcessor")
_FILTERS = (1, 2, 3)  # Pillow's numbers of Lanczos, bilinear and bicubic


def require_images(model: BifocalModel) -> None:
    """Check that a browser can prepare images as the model's image processor does.

    Raises:
        SiteError: if it cannot.
    """
    processor = model.processor.image_processor
    name = type(processor).__name__.removesuffix("Pil").removesuffix("Fast")
    if name not in _IMAGE_PROCESSORS or getattr(processor, "resample", None) not in _FILTERS:
        raise SiteError(
            f"A browser cannot prepare images as this model's {name} does. Omit --with-images: visitors then search by "
            "text and by images of the collection."
        )


def write_towers(
    model: BifocalModel, site: Path, with_images: bool, texts: Sequence[str], images: Sequence[Any]
) -> dict[str, dict[str, float]]:
    """Write the folder `model` of a site, and return how far the vectors of its int8 towers are from torch's.

    Args:
        model: in float32, with its processor.
        site: folder of the site.
        with_images: whether to write the image tower, too.
        texts, images: what the towers are compared on.

    Returns:
        For "text", and for "image" if it is written: `mean_cosine`, `lowest_cosine` and `compared`, their number.

    Raises:
        OnnxError: if a float32 file differs from torch.
        SiteError: if a tower cannot be exported or is too large, the tokenizer has no `tokenizer.json`, or
            `require_images` refuses.
    """
    towers = ("text", "image") if with_images else ("text",)
    if with_images:
        require_images(model)
    processor = with_model_max_length(model.processor, model)
    folder, scratch = site / MODEL, Path(tempfile.mkdtemp(dir=site.parent))
    (folder / "onnx").mkdir(parents=True)
    processor.save_pretrained(scratch)
    model.config.save_pretrained(scratch)
    for name in ("config.json", *_TOKENIZER_FILES, *(["preprocessor_config.json"] if with_images else [])):
        if not (scratch / name).exists():
            raise SiteError(f"The model's tokenizer is written without {name}, which a browser needs.")
        shutil.copyfile(scratch / name, folder / name)
        remove_paths(folder / name)
    try:
        export_onnx(model, scratch / "onnx", towers)
    except OnnxError as error:
        raise SiteError(str(error).removesuffix(WITHOUT_ONNX).strip()) from error
    differences: dict[str, dict[str, float]] = {}
    with quietly():  # some texts are too long
        exact = {"text": model.encode_text(list(texts), show_progress=False)}
        if with_images:
            exact["image"] = model.encode_image(list(images), show_progress=False)
        for precision in ("float32", "int8"):
            encoder = OnnxEncoder(scratch / "onnx", processor, precision, towers, no_overflow=True)
            encoded = {"text": encoder.encode_text(texts)}
            if with_images:
                encoded["image"] = encoder.encode_image(images)
            for tower, vectors in encoded.items():
                facts = compare_vectors(tower, precision, vectors, exact[tower])
                differences[tower] = {**facts, "compared": len(vectors)}
    for tower in towers:
        name = file_name(tower, "int8")
        if len(list((scratch / "onnx").glob(f"{name}*"))) > 1:  # weights beyond 2 GB have a file of their own
            raise SiteError(
                f"The {tower} tower is too large for a browser. Serve the index with bifocal serve --space."
            )
        shutil.copyfile(scratch / "onnx" / name, folder / "onnx" / name)
    return differences


def max_tokens(model: BifocalModel) -> int:
    """Return the length in tokens at which a site cuts queries."""
    return min(model.config.max_text_length, model.processor.tokenizer.model_max_length, _MAX_TOKENS)
