"""The code of the README, run as it stands there, and on texts of any length."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard

from bifocal.hub.export import export_model
from bifocal.modeling import BifocalModel
from tests import processes
from tests.conftest import EMPTY, LONG, TEXTS, small_config
from tests.modeling.test_images import photo

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCS = "".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md")))
BLOCKS = re.findall(r"```python\n(.*?)```", README + DOCS, re.DOTALL)
EDGES = ["black star", LONG, "Greek small letter omega", EMPTY]


@pytest.fixture(scope="module")
def folder(processor, tmp_path_factory) -> Path:
    """A working directory with what the README takes for granted: the demo's model, pictures, pairs."""
    root = tmp_path_factory.mktemp("reader")
    torch.manual_seed(0)
    export_model(BifocalModel(small_config()), root / "runs" / "demo" / "model", processor)
    (root / "pictures").mkdir()
    with (root / "pictures" / "metadata.jsonl").open("w") as file:
        for number, name in enumerate(("star", "omega", "third", "fourth")):
            photo(40 + number, 32).save(root / "pictures" / f"{name}.png")
            file.write(json.dumps({"file_name": f"{name}.png", "caption": TEXTS[number]}) + "\n")
    pairs = [json.dumps({"query": text, "positive": f"{text} again"}) for text in TEXTS]
    (root / "pairs.jsonl").write_text("\n".join(pairs) + "\n")
    return root


def test_there_are_three_ways():
    assert len(BLOCKS) == 3
    assert all(name in block for name, block in zip(("AutoModel", "MultiTaskTrainer", "SentenceTransformer"), BLOCKS))


def run(code: str, folder: Path) -> str:
    done = processes.run("-c", code, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


def compare_on_edges(block: str, listed: str, name: str, edges: list[str], folder: Path) -> str:
    """Run a block as it stands, then on texts of any length, and compare with `encode_text` and `encode_image`."""
    assert block.count(listed) == 1
    other = block.replace(listed, repr(edges))
    code = f"{block}\n{other}\nimport numpy as np\nnp.savez('found.npz', texts={name}, pictures=pictures)"
    printed = run(code, folder)
    found = np.load(folder / "found.npz")
    model = BifocalModel.from_pretrained(folder / "runs" / "demo" / "model")
    np.testing.assert_allclose(found["texts"], model.encode_text(edges), atol=1e-5)
    pictures = [folder / "pictures" / f"{name}.png" for name in ("star", "omega")]
    np.testing.assert_allclose(found["pictures"], model.encode_image(pictures), atol=1e-5)
    return printed


def test_auto_model(folder):
    assert "[[" in compare_on_edges(BLOCKS[0], '["black star", "greek small letter omega"]', "texts", EDGES, folder)


def test_trainer(folder):
    short = BLOCKS[1].replace("max_steps=1000", "max_steps=2").replace("batch_size=64", "batch_size=4")
    assert short.count("=2,") == 1
    assert short.count("batch_size=4") == 2, "only the size of the run is changed here"
    run(short, folder)
    model = BifocalModel.from_pretrained(folder / "runs" / "mine" / "model")
    assert model.encode_text("black star").shape == (40,)
    assert ModelCard.load(folder / "runs" / "mine" / "model" / "README.md").data.to_dict()["library_name"]


def test_sentence_transformer(folder):
    assert "tensor(" in compare_on_edges(BLOCKS[2], '["black star", "a filled star"]', "queries", EDGES, folder)


def test_links_and_commands_exist():
    for target in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / target).exists(), target
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"^make (\w+)", README, re.MULTILINE)) <= targets
    for name in re.findall(r"^\| `(\w+)/` \|", README, re.MULTILINE):
        assert (ROOT / name).is_dir(), name
