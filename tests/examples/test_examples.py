"""Each script of examples/ runs on its own data with a small model, and prints what its header says."""

import importlib.util
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch

from bifocal.hub.export import export_model
from bifocal.modeling import BifocalModel
from tests import families
from tests.conftest import small_config

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted(path.stem for path in (ROOT / "examples").glob("*.py"))
IMAGES, PAIRS = (str(ROOT / "examples" / "data" / name) for name in ("images", "pairs.jsonl"))


@pytest.fixture(scope="module")
def folder(processor, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model") / "model"
    export_model(BifocalModel(small_config()), folder, processor)
    return str(folder)


def run(name: str, capsys, *arguments: str) -> str:
    """What a script prints; it runs in this process, since importing torch takes seconds."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", ROOT / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(list(arguments))
    return capsys.readouterr().out


def trained(name: str, capsys, folder: str, out: Path, *arguments: str) -> str:
    """What a training script prints; its model loads and has moved away from the one that it started from."""
    printed = run(
        name, capsys, "--model", folder, "--images", IMAGES, "--pairs", PAIRS, "--steps", "2", "--batch-size", "8",
        "--out", str(out), *arguments,
    )  # fmt: skip
    assert printed.rstrip().endswith(f"The model is in {out}/model.")
    before, after = (BifocalModel.from_pretrained(path).encode_text("black star") for path in (folder, out / "model"))
    assert before.shape == after.shape
    assert not np.allclose(before, after, atol=1e-6)
    return printed


def test_encode(folder, capsys):
    lines = run("encode", capsys, "--model", folder, "--images", IMAGES).splitlines()
    assert [line.partition(":")[0] for line in lines] == [
        "black star", "greek small letter omega", "umbrella", "black chess knight",
    ]  # fmt: skip
    assert all(".png (" in line for line in lines)


def test_finetune(folder, tmp_path, capsys):
    trained("finetune", capsys, folder, tmp_path / "run")


def test_mine_then_stage3(folder, tmp_path, capsys):
    printed = trained("mine_then_stage3", capsys, folder, tmp_path / "run", "--num-negatives", "2")
    assert printed.splitlines()[1].startswith("  not: ")


def test_evaluate_own_data(folder, capsys):
    printed = run("evaluate_own_data", capsys, folder, "--images", IMAGES)
    assert "recall@5" in printed
    assert "0 rows skipped" in printed


def test_search(folder, tmp_path, capsys):
    arguments = ["black star", "--model", folder, "--images", IMAGES, "--out", str(tmp_path / "index")]
    assert run("search", capsys, *arguments).startswith("24 images added, 0 known before\n")
    lines = run("search", capsys, *arguments).splitlines()
    assert lines[0] == "0 images added, 24 known before"
    scores = [float(line.split()[0]) for line in lines[1:]]
    assert len(scores) == 5
    assert scores == sorted(scores, reverse=True)


def test_lora(folder, tmp_path, capsys):
    printed = trained("lora", capsys, folder, tmp_path / "run", "--rank", "2")
    assert printed.startswith("trainable params:")


def test_two_towers(tmp_path, capsys):
    for kind in ("BERT", "DINOv2"):
        families.save(kind, tmp_path / kind)
    printed = run(
        "two_towers", capsys, "--text", str(tmp_path / "BERT"), "--image", str(tmp_path / "DINOv2"), "--images", IMAGES,
        "--steps", "2", "--batch-size", "8", "--out", str(tmp_path / "run"),
    )  # fmt: skip
    assert printed.rstrip().endswith("Text vectors moved by 0.")
    model = BifocalModel.from_pretrained(tmp_path / "run" / "model")
    start = BifocalModel.from_towers(text=tmp_path / "BERT", image=tmp_path / "DINOv2")
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, start.state_dict()[name])}
    assert any(name.startswith("vision_model.encoder.layer.0.") for name in moved)
    assert not any(name.startswith("text_model.") for name in moved)


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_script_says_how_to_start_it_and_is_tested(name):
    source = (ROOT / "examples" / f"{name}.py").read_text(encoding="utf-8")
    header = source.split('"""')[1]
    commands = [line.split("Run:")[-1].strip() for line in header.splitlines() if "python examples/" in line]
    assert commands
    assert all(shlex.split(command)[1] == f"examples/{name}.py" for command in commands)
    assert "Prints" in header
    assert f"test_{name}" in globals()
    assert f"[{name}.py]({name}.py)" in (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
