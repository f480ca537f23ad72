"""A Hub-ready folder: complete, its card valid, and replaced whole."""

import json

import pytest
import torch
from huggingface_hub import ModelCard

from bifocal.hub.card import Card
from bifocal.hub.export import export_model
from bifocal.modeling import BifocalModel
from tests.conftest import small_config

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
    assert "Figures" not in card.text
    assert card.data.license is None


def test_a_folder_with_something_else_is_left_alone(model, tmp_path):
    (tmp_path / "thesis.tex").write_text("do not lose me")
    with pytest.raises(FileExistsError, match="holds something that is no model; choose another folder"):
        export_model(model, tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "do not lose me"
    assert [path.name for path in tmp_path.parent.iterdir() if path.name.startswith(f".{tmp_path.name}")] == []
