"""A small index of real images and texts, made by a seeded model."""

import io

import pytest
import torch

from bifocal.embedding.items import Item
from bifocal.embedding.models import weights_hash
from bifocal.hub.export import export_model
from bifocal.hub.sample_images import sample_pairs
from bifocal.hub.search.index import SearchIndex
from bifocal.hub.search.searcher import Searcher
from bifocal.modeling import BifocalModel
from tests.conftest import small_config
from tests.hub.search.serving import EVIL, Server, free_port
from tests.processes import Process


def sample_items() -> list[Item]:
    items = []
    for number, (text, image) in enumerate(sample_pairs()):
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
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
            tmp_path / name, str(model_folder), weights_hash(model_folder), 40, dims, precisions
        )  # fmt: skip
        return Searcher(index)

    return make


@pytest.fixture
def searcher(new) -> Searcher:
    made = new()
    made.add(sample_items())
    return made


@pytest.fixture(scope="session")
def served(model_folder, tmp_path_factory):
    """The page of an index, served by `bifocal serve`."""
    folder = tmp_path_factory.mktemp("page")
    index = SearchIndex.create(folder / "index", str(model_folder), weights_hash(model_folder), 40)
    Searcher(index).add([*sample_items(), Item("evil", EVIL)])
    port = free_port()
    command = ("-m", "bifocal", "serve", index.folder, "--port", str(port), "--title", "Shapes")
    with Server(Process(*command, cwd=folder, GRADIO_TEMP_DIR=str(folder / "uploads")), port, folder) as server:
        yield server
