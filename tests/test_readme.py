"""The code of the README, run as it stands there, and on texts of any length."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard

from bifocal.hub.export import export_model
from bifocal.modeling import BifocalModel
from tests import processes
from tests.conftest import EMPTY, LONG, small_config
from tests.docs.pages import README, ROOT, blocks

TEXT = README.read_text(encoding="utf-8")
BLOCKS = blocks(README, "python")
EDGES = ["black star", LONG, "Greek small letter omega", EMPTY]


@pytest.fixture(scope="module")
def folder(processor, tmp_path_factory) -> Path:
    """A working directory with what the README takes for granted: the demo's model and the data of the examples."""
    root = tmp_path_factory.mktemp("reader")
    torch.manual_seed(0)
    export_model(BifocalModel(small_config()), root / "runs" / "demo" / "model", processor)
    shutil.copytree(ROOT / "examples" / "data", root / "examples" / "data")
    return root


def test_it_is_short_and_shows_the_three_ways():
    assert len(TEXT.splitlines()) <= 150
    assert len(BLOCKS) == 3
    assert all(name in block for name, block in zip(("AutoModel", "MultiTaskTrainer", "SentenceTransformer"), BLOCKS))


def run_alone(code: str, folder: Path) -> str:
    """Run code in a process that has not imported Bifocal, and return what it prints."""
    done = processes.run("-c", code, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


def on_edges(block: str, listed: str, name: str, edges: list[str]) -> str:
    """A block as it stands, then on texts of any length; both kinds of vectors are kept in a file."""
    assert block.count(listed) == 1
    other = block.replace(listed, repr(edges))
    return f"{block}\n{other}\nimport numpy as np\nnp.savez('vectors.npz', texts={name}, images=images)"


def compare(edges: list[str], folder: Path) -> None:
    """Compare the vectors in the file with those of `encode_text` and `encode_image`."""
    vectors = np.load(folder / "vectors.npz")
    model = BifocalModel.from_pretrained(folder / "runs" / "demo" / "model")
    np.testing.assert_allclose(vectors["texts"], model.encode_text(edges), atol=1e-5)
    images = [folder / "examples" / "data" / "images" / f"{name}.png" for name in ("star", "omega")]
    np.testing.assert_allclose(vectors["images"], model.encode_image(images), atol=1e-5)


def test_auto_model(folder):
    code = on_edges(BLOCKS[0], '["black star", "greek small letter omega"]', "texts", EDGES)
    assert "[[" in run_alone(f"{code}\nimport sys\nassert 'bifocal' not in sys.modules", folder)
    compare(EDGES, folder)
    output = np.array(re.findall(r"-?\d\.\d+", blocks(README, "text")[0]), dtype=float).reshape(2, 2)
    assert output.argmax(axis=1).tolist() == [0, 1], "the output shown finds each image"


def test_trainer(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    short = BLOCKS[1].replace("max_steps=100,", "max_steps=2,").replace("batch_size=16", "batch_size=4")
    assert short.count("max_steps=2,") == 1
    assert short.count("batch_size=4") == 2, "only the size of the run is changed here"
    exec(compile(short, "README.md", "exec"), {"__name__": "readme"})
    model = BifocalModel.from_pretrained(folder / "runs" / "mine" / "model")
    assert model.encode_text("black star").shape == (40,)
    assert ModelCard.load(folder / "runs" / "mine" / "model" / "README.md").data.to_dict()["library_name"]


def test_sentence_transformer(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    code = on_edges(BLOCKS[2], '["black star", "a filled star"]', "queries", EDGES)
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
    assert "tensor(" in capsys.readouterr().out
    compare(EDGES, folder)


def test_rooms_exist():
    for names in re.findall(r"^\| ((?:`\w+/`(?:, )?)+) \|", TEXT, re.MULTILINE):
        for name in re.findall(r"`(\w+)/`", names):
            assert (ROOT / name).is_dir(), name
