"""The same folder through sentence-transformers: one space, equal vectors, its own trainer."""

import numpy as np
import pytest
import torch
from PIL import Image

from bifocal.hub.export import export_model
from bifocal.modeling import BifocalModel
from tests.conftest import TEXTS, small_config
from tests.modeling.test_images import photo

sentence_transformers = pytest.importorskip("sentence_transformers")


@pytest.fixture(scope="module")
def folder(processor, tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("exported") / "small"
    return export_model(BifocalModel(small_config()), path, processor)


@pytest.fixture(scope="module")
def sentences(folder):
    return sentence_transformers.SentenceTransformer(str(folder), trust_remote_code=True, device="cpu")


@pytest.fixture(scope="module")
def model(folder):
    return BifocalModel.from_pretrained(folder)


def test_texts_and_images_as_from_the_model(sentences, model):
    np.testing.assert_allclose(sentences.encode(TEXTS), model.encode_text(TEXTS), atol=1e-6)
    images = [photo(), photo(33, 80).convert("L"), photo().convert("RGBA"), Image.new("I;16", (40, 40), 30000)]
    np.testing.assert_allclose(sentences.encode(images), model.encode_image(images), atol=1e-6)
    similarity = sentences.similarity(sentences.encode(TEXTS), sentences.encode(images))
    expected = model.encode_text(TEXTS) @ model.encode_image(images).T
    np.testing.assert_allclose(similarity.numpy(), expected, atol=1e-5)
    assert sentences.similarity_fn_name == "cosine"


def test_dimensions_queries_documents_and_prompts(folder, sentences, model):
    assert sentences.get_embedding_dimension() == 40
    assert sentences.max_seq_length == 64
    np.testing.assert_allclose(sentences.encode_query(TEXTS), model.encode_text(TEXTS), atol=1e-6)
    np.testing.assert_allclose(sentences.encode_document(TEXTS), model.encode_text(TEXTS), atol=1e-6)
    prompted = [f"query: {text}" for text in TEXTS]
    np.testing.assert_allclose(sentences.encode(TEXTS, prompt="query: "), model.encode_text(prompted), atol=1e-6)
    short = sentence_transformers.SentenceTransformer(str(folder), truncate_dim=8, device="cpu")
    vectors = short.encode(TEXTS, normalize_embeddings=True)
    np.testing.assert_allclose(vectors, model.encode_text(TEXTS, truncate_dim=8), atol=1e-6)


def test_its_trainer_takes_steps(folder, tmp_path):
    from datasets import Dataset
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    trained = sentence_transformers.SentenceTransformer(str(folder), device="cpu")
    texts, images = trained[0].model.text_model, trained[0].model.vision_model
    before = [module.layers[0].attention.q_proj.weight.clone() for module in (texts, images)]
    data = {
        "captions": Dataset.from_dict({"anchor": TEXTS[:4], "positive": [photo(40 + n, 40) for n in range(4)]}),
        "texts": Dataset.from_dict({"anchor": TEXTS[:4], "positive": [text.upper() for text in TEXTS[:4]]}),
    }
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=4, learning_rate=1e-3, report_to="none",
        use_cpu=True, save_strategy="no",
    )  # fmt: skip
    loss = MultipleNegativesRankingLoss(trained)
    SentenceTransformerTrainer(model=trained, args=arguments, train_dataset=data, loss=loss).train()
    after = [module.layers[0].attention.q_proj.weight for module in (texts, images)]
    assert all((a - b).abs().max() > 1e-5 for a, b in zip(after, before, strict=True))
    trained.save_pretrained(str(tmp_path / "trained"))
    again = BifocalModel.from_pretrained(tmp_path / "trained")
    np.testing.assert_allclose(again.encode_text(TEXTS), trained.encode(TEXTS), atol=1e-6)
