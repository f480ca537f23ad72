"""A Hub-ready folder: complete, its card valid, and replaced whole."""

import copy
import json

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard

from bifocal.hub.card import Card
from bifocal.hub.export import export_model
from bifocal.modeling import BifocalModel, BifocalProcessor
from tests.conftest import EMPTY, LONG, TEXTS, small_config

CARD = Card(
    name="someone/small-model",
    description="A model for tests.",
    metrics={"recall@5": 0.712},
    protocol="On nothing much.",
    license="apache-2.0",
)


@pytest.fixture
def folder(processor, tmp_path):
    torch.manual_seed(0)
    return export_model(BifocalModel(small_config()), tmp_path / "model", processor, CARD)


def test_complete(folder):
    files = {path.name for path in folder.iterdir()}
    wanted = (
        "config.json model.safetensors modeling_bifocal.py processor_config.json tokenizer.json modules.json "
        "sentence_bert_config.json config_sentence_transformers.json README.md"
    )
    assert set(wanted.split()) <= files
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pkl"))]
    kinds = json.loads((folder / "sentence_bert_config.json").read_text())["modality_config"]
    assert kinds["image"] == {"method": "get_image_features", "method_output_name": "pooler_output"}
    modules = [module["type"] for module in json.loads((folder / "modules.json").read_text())]
    assert all(module.startswith("sentence_transformers.") for module in modules), "no module code of ours"
    for path in folder.glob("*.json"):
        assert str(folder.parent) not in path.read_text(), f"{path.name} names a folder of this machine"


@pytest.mark.parametrize(("tokenizer_limit", "tower_limit"), [(100, 64), (40, 64), (10**30, 64)])
def test_one_limit_for_all_who_read_the_folder(processor, tmp_path, tokenizer_limit, tower_limit):
    """`encode_text`, the processor, sentence-transformers and `tokenizers` cut a text at the same token."""
    from sentence_transformers import SentenceTransformer
    from tokenizers import Tokenizer

    limit = min(tokenizer_limit, tower_limit)
    given = copy.deepcopy(processor)
    given.tokenizer.model_max_length = tokenizer_limit
    given.tokenizer(TEXTS, truncation=True, max_length=7, padding="max_length")  # leaves its mark in the tokenizer
    model = BifocalModel(small_config(text_config={"max_position_embeddings": tower_limit})).eval()
    folder = export_model(model, tmp_path / "model", given)
    assert given.tokenizer.model_max_length == tokenizer_limit, "what was given is left alone"

    loaded = BifocalModel.from_pretrained(folder)
    wanted = loaded.encode_text(LONG)
    tokenizer = loaded.processor.tokenizer
    cut = [*tokenizer(LONG)["input_ids"][: limit - 1], tokenizer.sep_token_id]
    assert Tokenizer.from_file(str(folder / "tokenizer.json")).encode(LONG).ids == cut
    assert len(Tokenizer.from_file(str(folder / "tokenizer.json")).encode("black star").ids) < 20, "and pads nothing"
    assert loaded.processor(text=LONG)["input_ids"] == cut
    assert loaded.processor(text=LONG, padding=True)["input_ids"] == cut, "as cards of before have it"
    sentences = SentenceTransformer(str(folder), device="cpu")
    assert sentences.max_seq_length == limit
    np.testing.assert_allclose(sentences.encode(LONG), wanted, atol=1e-6)
    with torch.no_grad():
        vectors = loaded(input_ids=torch.tensor([cut])).text_embeds[0]
    np.testing.assert_allclose(vectors.numpy(), wanted, atol=1e-6)


def test_a_limit_set_later_counts(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    again = BifocalProcessor.from_pretrained(tmp_path)
    again.tokenizer.model_max_length = 16
    assert len(again(text=[LONG, EMPTY], return_tensors="pt")["input_ids"][0]) == 16
    assert len(again(text=LONG, truncation=False)["input_ids"]) > 64
    again.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "tokenizer.json").read_text())["truncation"]["max_length"] == 16


def test_the_card(folder):
    card = ModelCard.load(folder / "README.md")
    assert card.data.to_dict()["library_name"] == "sentence-transformers"
    assert card.data.license == "apache-2.0"
    assert "| recall@5 | 0.712 |" in card.text
    assert 'from_pretrained("someone/small-model", trust_remote_code=True)' in card.text


def test_an_earlier_folder_is_replaced_whole(folder, processor):
    (folder / "left-over.txt").write_text("old")
    model = BifocalModel(small_config(projection_dim=24))
    export_model(model, folder, processor, CARD)
    assert not (folder / "left-over.txt").exists()
    assert BifocalModel.from_pretrained(folder).config.projection_dim == 24
    assert [path.name for path in folder.parent.iterdir()] == ["model"], "nothing is left beside it"


def test_a_card_without_figures(model, tmp_path):
    folder = export_model(model, tmp_path / "plain")
    card = ModelCard.load(folder / "README.md")
    assert "# plain" in card.text
    assert "into one space of 40 dimensions" in card.text
    assert "Of a text longer than 64 tokens, only the beginning is embedded." in card.text
    assert "Figures" not in card.text
    assert card.data.license is None


def test_a_folder_with_something_else_is_left_alone(model, tmp_path):
    (tmp_path / "thesis.tex").write_text("do not lose me")
    with pytest.raises(FileExistsError, match="holds something that is no model; choose another folder"):
        export_model(model, tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "do not lose me"
    assert [path.name for path in tmp_path.parent.iterdir() if path.name.startswith(f".{tmp_path.name}")] == []
