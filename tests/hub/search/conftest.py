"""A small index of real pictures and texts, made by a seeded model."""

import io

import pytest
import torch

from bifocal.hub.export import export_model
from bifocal.hub.sample_images import sample_pairs
from bifocal.hub.search.index import SearchIndex, weights_of
from bifocal.hub.search.items import Item
from bifocal.hub.search.searcher import Searcher
from bifocal.modeling import BifocalModel
from tests.conftest import small_config


def made_items() -> list[Item]:
    items = []
    for number, (text, picture) in enumerate(sample_pairs()):
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        items.append(Item(f"drawings/{number}.png", text, buffer.getvalue()))
        items.append(Item(f"texts.jsonl:{number}", f"{text} on paper"))
    return items


@pytest.fixture(scope="session")
def model_folder(processor, tmp_path_factory):
    torch.manual_seed(0)
    return export_model(BifocalModel(small_config()), tmp_path_factory.mktemp("search") / "model", processor)


@pytest.fixture
def new(model_folder, tmp_path):
    """Makes an empty index: new(dims, precisions)."""

    def make(dims=(), precisions=("float32",), name="index") -> Searcher:
        index = SearchIndex.create(
            tmp_path / name, str(model_folder), weights_of(model_folder), 40, dims, precisions
        )  # fmt: skip
        return Searcher(index)

    return make


@pytest.fixture
def searcher(new) -> Searcher:
    made = new()
    made.add(made_items())
    return made
