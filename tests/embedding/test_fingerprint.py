"""Two models have one fingerprint only if they give the same vectors."""

import shutil
from copy import deepcopy

import numpy as np
import pytest
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding

from bifocal.embedding.fingerprint import model_fingerprint
from bifocal.embedding.models import load_model
from bifocal.evaluation.encoders import load_encoder
from bifocal.modeling import BifocalModel
from tests import families
from tests.evaluation.test_encoders import save_naflex, sentence_model

TEXTS = ["rain and red", "far blue circles"]


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder with models of four kinds."""
    root = tmp_path_factory.mktemp("models")
    for kind in ("BERT", "ViT"):
        families.save(kind, root / kind)
    model = BifocalModel.from_towers(root / "BERT", root / "ViT", prompts={"query": "rain "})
    model.save_pretrained(root / "joint")
    model.processor.save_pretrained(root / "joint")
    sentence_model(root / "BERT", root / "sentences", prompts={"query": "rain "})
    save_naflex(root / "naflex")
    static = StaticEmbedding(families.tokenizer("siglip").backend_tokenizer, embedding_dim=8)
    SentenceTransformer(modules=[static], device="cpu").save_pretrained(str(root / "static"), create_model_card=False)
    return root


@pytest.mark.parametrize("kind", ["joint", "sentences", "naflex", "static"])
def test_a_model_keeps_its_fingerprint_where_it_is_used_and_moved(here, tmp_path, kind):
    encoder = load_encoder(str(here / kind), batch_size=1)
    before = encoder.fingerprint.__wrapped__()
    encoder.texts(TEXTS * 10, "query")
    if encoder.image is not None:
        encoder.images([Image.new("RGB", (40, 40))] * 2)
    assert encoder.fingerprint.__wrapped__() == before
    shutil.copytree(here / kind, tmp_path / "moved")
    assert load_encoder(str(tmp_path / "moved")).fingerprint() == before


def require_others(one, other):
    """Check that two models differ in their vectors, and so in their fingerprints."""
    vectors = [model.encode(TEXTS, convert_to_tensor=True).float().numpy() for model in (one, other)]
    assert np.abs(vectors[0] - vectors[1]).max() > 1e-4, "or this test shows nothing"
    assert model_fingerprint(one) != model_fingerprint(other)


def test_weights_that_are_stored_in_a_dtype_and_those_that_are_loaded_in_it(here, tmp_path):
    """They are equal, but the second pools in float32."""
    stored = load_model(str(here / "sentences")).model
    stored.bfloat16().save_pretrained(str(tmp_path), create_model_card=False)
    require_others(load_model(str(tmp_path)).model, load_model(str(tmp_path), "bfloat16").model)


@pytest.mark.parametrize("change", ["scale", "disabled"])
def test_adapters_with_equal_weights(here, change):
    peft = pytest.importorskip("peft")

    model = load_model(str(here / "sentences")).model
    torch.manual_seed(0)
    adapters = peft.LoraConfig(target_modules=["query", "value"], r=2, lora_alpha=4, init_lora_weights=False)
    peft.inject_adapter_in_model(adapters, model[0].model)
    other = deepcopy(model)
    for module in other.modules():
        if change == "scale" and isinstance(getattr(module, "scaling", None), dict):
            module.scaling["default"] = 32.0
        elif change == "disabled" and type(module).__module__.startswith("peft."):
            module.enable_adapters(False)
    require_others(model.eval(), other.eval())


def test_another_image_processor_with_equal_settings(here):
    """One that resizes with torchvision saves the same file as one that does with Pillow."""
    model = BifocalModel.from_pretrained(here / "joint")
    before = model_fingerprint(model)
    processor = deepcopy(model.processor)
    processor.image_processor.__class__ = type("Other", (type(processor.image_processor),), {})
    assert model_fingerprint(model, processor) != before
