"""Other libraries embed with a model as docs/integrations.md says: its blocks are run as they are."""

import re
import shutil
from importlib.metadata import PackageNotFoundError, version
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
# The distributions that a library's blocks need, through sentence-transformers and through the API.
NEEDED = {
    "LangChain": (["langchain-huggingface"], ["langchain-openai"]),
    "LlamaIndex": (["llama-index-embeddings-huggingface"], ["llama-index-embeddings-openai-like"]),
    "Haystack": (["haystack-ai", "sentence-transformers-haystack"], ["haystack-ai"]),
    "Chroma": (["chromadb"], ["chromadb", "openai"]),
}
# Their warnings are their own; Chroma's client leaves its files to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore")


def libraries(number: int) -> list[Any]:
    """The libraries as parameters, skipped where one of the distributions is missing."""
    parameters = []
    for library, needed in NEEDED.items():
        missing = [name for name in needed[number] if not is_installed(name)]
        reason = f"pip install {' '.join(missing)}"
        parameters.append(pytest.param(library, marks=pytest.mark.skipif(bool(missing), reason=reason)))
    return parameters


def is_installed(distribution: str) -> bool:
    try:
        return bool(version(distribution))
    except PackageNotFoundError:
        return False


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
    config = small_config()
    config.prompts = PROMPTS if request.param else {}
    model = BifocalModel(config).eval()
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
    return re.findall(r"^```python\n(.*?)^```", section[1], re.DOTALL | re.MULTILINE)[number]


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


@pytest.mark.parametrize("library", libraries(0))
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


@pytest.mark.parametrize("library", libraries(1))
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
