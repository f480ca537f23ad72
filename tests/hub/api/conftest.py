"""A small model with prompts, its index, and `bifocal serve --api` over both."""

import socket
from pathlib import Path

import pytest
import torch

from bifocal.embedding.items import Item
from bifocal.embedding.models import EmbeddingModel, load_model, weights_hash
from bifocal.hub.export import export_model
from bifocal.hub.search.index import SearchIndex
from bifocal.hub.search.searcher import Searcher
from bifocal.modeling import BifocalModel
from tests.conftest import small_config
from tests.hub.search.conftest import sample_items
from tests.hub.search.serving import EVIL, Server, free_port
from tests.processes import Process

PROMPTS = {"query": "query: ", "document": "passage: ", "title": "title of "}


@pytest.fixture(scope="session")
def model_folder(processor, tmp_path_factory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("api") / "shapes"
    return export_model(BifocalModel(small_config(prompts=PROMPTS)), folder, processor)


@pytest.fixture(scope="session")
def model(model_folder) -> EmbeddingModel:
    return load_model(str(model_folder))


@pytest.fixture(scope="session")
def searcher(model_folder, model, tmp_path_factory) -> Searcher:
    folder = tmp_path_factory.mktemp("api") / "index"
    prompts = {role: PROMPTS[role] for role in ("query", "document")}
    index = SearchIndex.create(
        folder, str(model_folder), weights_hash(model_folder), 40, (40, 16), ("float32", "int8"), prompts=prompts
    )
    searcher = Searcher(index, model)
    searcher.add([*sample_items(), Item("evil", EVIL)])
    return searcher


@pytest.fixture(scope="session")
def served(searcher, tmp_path_factory):
    """The page and the API of an index, served by `bifocal serve --api`."""
    folder = tmp_path_factory.mktemp("served")
    port = free_port()
    command = ("-m", "bifocal", "serve", searcher.index.folder, "--api", "--port", str(port))
    with Server(Process(*command, cwd=folder, GRADIO_TEMP_DIR=str(folder / "uploads")), port, folder) as server:
        yield server
        # A page that is open in a browser has a stream that never ends; the server does not wait for it.
        with socket.create_connection(("127.0.0.1", port)) as visitor:
            visitor.sendall(b"GET /gradio_api/heartbeat/abc HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            assert visitor.recv(1000).startswith(b"HTTP/1.1 200")
            server.process.terminate()
            server.process.process.join(20)
            assert server.process.process.exitcode == 0, server.process.stderr
