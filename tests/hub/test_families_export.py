"""Exported models of every family: sentence-transformers, ONNX and a process without Bifocal give the same vectors."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from bifocal.hub.check import check_folder
from bifocal.hub.export import export_model, with_model_max_length
from bifocal.hub.export_run import export_run
from bifocal.hub.onnx import OnnxEncoder, export_onnx
from bifocal.modeling import BifocalModel
from tests import families
from tests.modeling.test_families import images
from tests.modeling.test_loading import run_python

TOLERANCE = 1e-5
TEXTS = [*families.TEXTS, "", "wordless " * 50]
PAIRS = {
    **{f"{text}+ViT": (text, "ViT") for text in families.TEXT_TOWERS},
    "BERT+DINOv2": ("BERT", "DINOv2"),
    "ModernBERT+DINOv3": ("ModernBERT", "DINOv3"),
}
KINDS = [*families.DUAL_ENCODERS, *PAIRS]
# The others were compared by hand: every family exports.
ONNX = ["BERT+DINOv2", "ModernBERT+DINOv3"]  # and CLIP and SigLIP below
WITHOUT_BIFOCAL = ["SigLIP 2", "Chinese-CLIP", "NomicBert+ViT", "ModernBERT+DINOv3"]


class Models:
    """Models of each family and their exported folders, made when they are first needed."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.models: dict[str, Any] = {}

    def source(self, kind: str) -> Path:
        folder = self.root / "sources" / kind.replace(" ", "-")
        if not folder.exists():
            families.save(kind, folder)
        return folder

    def model(self, kind: str) -> Any:
        if kind not in self.models:
            if kind in PAIRS:
                text, image = map(self.source, PAIRS[kind])
                self.models[kind] = BifocalModel.from_towers(text, image)
            else:
                self.models[kind] = BifocalModel.from_pretrained(self.source(kind))
        return self.models[kind].eval()

    def exported(self, kind: str) -> Path:
        folder = self.root / "exports" / kind.replace(" ", "-")
        if not folder.exists():
            export_model(self.model(kind), folder)
        return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Models:
    return Models(tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize("kind", KINDS)
def test_sentence_transformers(models, kind):
    model, folder = models.model(kind), models.exported(kind)
    sentences = SentenceTransformer(str(folder), trust_remote_code=True, device="cpu")
    assert sentences.max_seq_length == model.config.max_text_length == families.LENGTH
    expected = model.encode_text(TEXTS)
    np.testing.assert_allclose(sentences.encode(TEXTS), expected, atol=TOLERANCE)
    np.testing.assert_allclose(sentences.encode(TEXTS, batch_size=2), expected, atol=TOLERANCE)
    for text, vector in zip(TEXTS, expected, strict=True):
        np.testing.assert_allclose(sentences.encode(text), vector, atol=TOLERANCE)
    np.testing.assert_allclose(sentences.encode(images()), model.encode_image(images()), atol=TOLERANCE)
    for image in images():
        np.testing.assert_allclose(sentences.encode(image), model.encode_image(image), atol=TOLERANCE)
    saved = json.loads((folder / "config_sentence_transformers.json").read_text())["prompts"]
    assert {name: text for name, text in saved.items() if text} == model.config.prompts
    for encode, name in ((sentences.encode_query, "query"), (sentences.encode_document, "document")):
        prompt = model.config.prompts.get(name, "")
        np.testing.assert_allclose(encode(TEXTS), model.encode_text(TEXTS, prompt=prompt), atol=TOLERANCE)


def test_prompts_have_names_that_sentence_transformers_uses(models, tmp_path):
    prompts = {"query": "find: ", "document": "note: ", "topic": "about: "}
    model = BifocalModel.from_towers(models.source("BERT"), models.source("ViT"), prompts=prompts)
    sentences = SentenceTransformer(str(export_model(model, tmp_path / "model")), trust_remote_code=True, device="cpu")
    for vectors, name in (
        (sentences.encode_query("rain"), "query"),
        (sentences.encode_document("rain"), "document"),
        (sentences.encode("rain", prompt_name="topic"), "topic"),
    ):
        np.testing.assert_allclose(vectors, model.encode_text("rain", prompt_name=name), atol=TOLERANCE)
    assert "| topic | `about: ` |" in (tmp_path / "model" / "README.md").read_text()


@pytest.mark.parametrize("kind", ONNX)
def test_onnx(models, kind, tmp_path):
    model = models.model(kind)
    export_onnx(model, tmp_path)
    encoder = OnnxEncoder(tmp_path, with_model_max_length(model.processor, model))
    for rows in (range(len(TEXTS)), *([row] for row in range(len(TEXTS))), [0, 2, 5]):
        texts = [TEXTS[row] for row in rows]
        np.testing.assert_allclose(encoder.encode_text(texts), model.encode_text(texts), atol=TOLERANCE)
    for chosen in (images(), images()[1:2]):
        np.testing.assert_allclose(encoder.encode_image(chosen), model.encode_image(chosen), atol=TOLERANCE)
    too_long = np.ones((1, families.LENGTH + 1), np.int64)
    with pytest.raises(Exception, match=f"truncate_texts_to_{families.LENGTH}_tokens"):
        encoder.sessions["text"].run(None, {"input_ids": too_long, "attention_mask": too_long})


def test_onnx_files_of_16_bit_weights_are_in_float32(models, tmp_path):
    """ONNX Runtime does not know all steps of CLIP in bfloat16."""
    half = BifocalModel.from_pretrained(models.source("CLIP"), dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    half.processor.save_pretrained(tmp_path / "half")
    folder = export_run(tmp_path / "half", tmp_path / "release")
    assert BifocalModel.from_pretrained(folder).dtype == torch.bfloat16, "the weights stay as they are"
    model = BifocalModel.from_pretrained(folder, dtype=torch.float32)
    encoder = OnnxEncoder(folder / "onnx", model.processor)
    np.testing.assert_allclose(encoder.encode_text(TEXTS), model.encode_text(TEXTS), atol=TOLERANCE)
    np.testing.assert_allclose(encoder.encode_image(images()), model.encode_image(images()), atol=TOLERANCE)


def test_a_release_of_a_plain_siglip_passes_its_own_check(models, tmp_path, quick_check):
    """With its ONNX files, whose tokenizer gives no mask by default; texts are padded to full length in them."""
    folder = export_run(models.source("SigLIP"), tmp_path / "release")
    result = check_folder(folder)
    assert not result.problems, result.problems
    assert set(result.differences) == {"AutoModel", "SentenceTransformer", "ONNX, float32", "ONNX by tokenizer.json"}
    assert max(result.differences.values()) < TOLERANCE
    card = (folder / "README.md").read_text()
    assert f"up to {families.LENGTH} tokens, always padded to {families.LENGTH}" in card


def test_images_are_as_large_as_the_processor_makes_them(models):
    """DINOv2's configuration names the size that its position table is for."""
    model, card = models.model("BERT+DINOv2"), (models.exported("BERT+DINOv2") / "README.md").read_text()
    assert model.config.vision_config.image_size == 2 * families.SIDE
    assert f"| image: Dinov2 | 2 | 32 | 4 | {count(model.vision_model, model.vision_projection):,} |" in card
    assert f"| text: Bert | 2 | 32 | 4 | {count(model.text_model):,} |" in card
    assert (
        f"{families.SIDE} x {families.SIDE} pixels, patches of 8 | its own pooled output, a linear projection |" in card
    )


def count(*modules: Any) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def test_a_process_without_bifocal(models, tmp_path):
    folders = {kind: str(models.exported(kind)) for kind in WITHOUT_BIFOCAL}
    for number, kind in enumerate(WITHOUT_BIFOCAL):
        model = models.model(kind)
        np.savez(tmp_path / f"{number}.npz", texts=model.encode_text(TEXTS), images=model.encode_image(images()))
        for index, image in enumerate(images()):
            image.save(tmp_path / f"{index}.png")
    run_python(
        f"""
import sys
sys.modules["bifocal"] = None
import numpy as np
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoProcessor
images = [Image.open(f"{tmp_path}/{{number}}.png") for number in range({len(images())})]
for number, folder in enumerate({list(folders.values())!r}):
    expected = np.load(f"{tmp_path}/{{number}}.npz")
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules."), folder
    assert abs(model.encode_text({TEXTS!r}) - expected["texts"]).max() <= {TOLERANCE}, folder
    assert abs(model.encode_image(images) - expected["images"]).max() <= {TOLERANCE}, folder
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    batch = processor(text={TEXTS!r}, images=images, return_tensors="pt")
    with torch.no_grad():
        output = model(batch["input_ids"], batch["attention_mask"], batch["pixel_values"])
    assert abs(output.text_embeds.numpy() - expected["texts"]).max() <= {TOLERANCE}, folder
    sentences = SentenceTransformer(folder, trust_remote_code=True, device="cpu")
    assert abs(sentences.encode({TEXTS!r}) - expected["texts"]).max() <= {TOLERANCE}, folder
    assert abs(sentences.encode(images) - expected["images"]).max() <= {TOLERANCE}, folder
""",
        tmp_path,
    )
