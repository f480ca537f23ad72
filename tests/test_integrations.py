"""Other libraries embed with a model as docs/integrations.md says: its blocks are run as they are."""

import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from bifocal.hub.export import export_model
from bifocal.modeling import BifocalModel
from tests.conftest import small_config
from tests.docs.pages import ROOT, blocks
from tests.hub.search.serving import Server, free_port
from tests.processes import Process

PAGE = ROOT / "docs" / "integrations.md"
MODEL, ADDRESS = "runs/demo/model", "http://127.0.0.1:7860"  # on the page
TEXTS = ["a red star", "two blue circles"]
PROMPTS = {"query": "query: ", "document": "passage: "}
# What a block imports, and the distribution that has it.
NEEDED = {
    "langchain_huggingface": "langchain-huggingface",
    "langchain_openai": "langchain-openai",
    "llama_index.embeddings.huggingface": "llama-index-embeddings-huggingface",
    "llama_index.embeddings.openai_like": "llama-index-embeddings-openai-like",
    "haystack_integrations.components.embedders.sentence_transformers": "sentence-transformers-haystack",
    "haystack": "haystack-ai",
    "chromadb": "chromadb",
}
# Their warnings are their own; Chroma's client leaves its files to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def quiet(monkeypatch, tmp_path):
    """Let no library report to its makers or write into the home folder."""
    monkeypatch.setenv("HAYSTACK_TELEMETRY_ENABLED", "False")
    monkeypatch.setenv("ANONYMIZED_TELEMETRY", "False")
    monkeypatch.setenv("LLAMA_INDEX_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture(scope="module", params=[False, True], ids=["", "prompts"])
def reader(request, processor, tmp_path_factory) -> SimpleNamespace:
    """A working directory as the page takes it for granted, and the model in it."""
    folder = tmp_path_factory.mktemp("reader")
    torch.manual_seed(0)
    model = BifocalModel(small_config(prompts=PROMPTS if request.param else {})).eval()
    export_model(model, folder / MODEL, processor)
    model.processor = processor
    (folder / "examples").mkdir()
    shutil.copytree(ROOT / "examples" / "data", folder / "examples" / "data")
    return SimpleNamespace(folder=folder, model=model, prompts=request.param)


@pytest.fixture(scope="module")
def api(reader, tmp_path_factory):
    """The address of the server that the page starts."""
    folder, port = tmp_path_factory.mktemp("served"), free_port()
    serve = ["serve", "--model", "runs/demo/model", "--api", "--model-name", "clip"]
    command = ("-m", "bifocal", *serve, "--port", str(port))
    with Server(Process(*command, cwd=reader.folder), port, folder, "/health") as server:
        yield server.address


def block_of(library: str, number: int) -> str:
    """A library's block of Python: 0 is through sentence-transformers, 1 through the API."""
    section = re.search(rf"^## {library}\n(.*?)^## ", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert section is not None
    block = re.findall(r"^```python\n(.*?)^```", section[1], re.DOTALL | re.MULTILINE)[number]
    for module, distribution in NEEDED.items():
        if re.search(rf"^(from|import) {re.escape(module)}\b", block, re.MULTILINE):
            pytest.importorskip(module, reason=f"{distribution} is not installed: pip install {distribution}")
    return block


def run(block: str, folder: Path, monkeypatch: Any) -> dict[str, Any]:
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {"__name__": "page"}
    exec(compile(block, "page", "exec"), names)
    return names


def check(names: dict[str, Any], documents: Any, query: Any) -> None:
    """Compare what a block leaves behind with the model's own vectors."""
    if "collection" in names:
        kept = names["collection"].get(ids=["1", "2"], include=["embeddings"])["embeddings"]
        np.testing.assert_allclose(kept, documents, atol=1e-5)
        assert names["hits"]["documents"] == [[TEXTS[int((documents @ query).argmax())]]]
        return
    np.testing.assert_allclose(names["documents"], documents, atol=1e-5)
    np.testing.assert_allclose(names["query"], query, atol=1e-5)


@pytest.mark.parametrize("library", ["LangChain", "LlamaIndex", "Haystack", "Chroma"])
def test_through_sentence_transformers(reader, library, monkeypatch):
    block = block_of(library, 0)
    if reader.prompts and library in ("LlamaIndex", "Chroma"):
        pytest.skip("the page says what to change for prompts")
    block = block.replace(MODEL, str(reader.folder / MODEL))  # Haystack and Chroma keep models by the name they get
    names = run(block, reader.folder, monkeypatch)
    check(names, reader.model.encode_document(TEXTS), reader.model.encode_query("star"))
    if "image" in names:
        star = reader.folder / "examples" / "data" / "images" / "star.png"
        np.testing.assert_allclose(names["image"], reader.model.encode_image(star), atol=1e-5)


@pytest.mark.parametrize("library", ["LangChain", "LlamaIndex", "Haystack", "Chroma"])
def test_through_the_api(reader, library, request, monkeypatch):
    block = block_of(library, 1)
    if reader.prompts:
        pytest.skip("the same without prompts")
    assert ADDRESS in block
    block = block.replace(ADDRESS, request.getfixturevalue("api"))
    names = run(block, reader.folder, monkeypatch)
    check(names, reader.model.encode_text(TEXTS), reader.model.encode_text("star"))


def test_every_block_is_run():
    assert len(blocks(PAGE, "python")) == 8
