"""Publishing through the real huggingface_hub to a server instead of the Hub, and loading from there."""

import json
import shutil
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch

from bifocal.files import MARKER
from bifocal.hub.export import export_model
from bifocal.hub.push import PushError, validate_folder
from bifocal.modeling import BifocalModel
from tests import processes
from tests.conftest import small_config
from tests.hub_stand_in import TOKEN, hub
from tests.processes import forget_hub


@pytest.fixture(scope="module")
def exported(processor, tmp_path_factory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("push") / "model"
    export_model(BifocalModel(small_config()), folder, processor)
    return folder


# huggingface_hub waits longer and longer between its attempts; here it need not.
COMMAND = "import sys, time; time.sleep = lambda seconds: None; from bifocal.cli import main; main()"


def run(*command: str, token: str = TOKEN) -> CompletedProcess:
    """A command where the Hub is elsewhere."""
    return processes.run("-c", COMMAND, *command, hub=True, HF_TOKEN=token)


LOAD = """
import json
from transformers import AutoModel
from sentence_transformers import SentenceTransformer
a = AutoModel.from_pretrained("org/stars", trust_remote_code=True).encode_text("black star")
b = SentenceTransformer("org/stars", trust_remote_code=True).encode("black star")
print(json.dumps([float(abs(a - b).max()), len(b)]))
"""


def test_pushed_and_loaded_by_name(exported, tmp_path):
    with hub() as (address, state):
        done = run("push", str(exported), "org/stars", "--private", "--yes")
        assert done.returncode == 0, done.stderr[-3000:]
        assert "model.safetensors" in done.stdout, "it says what it uploads"
        assert done.stdout.strip().splitlines()[-1].startswith(f"Published: {address}/org/stars/commit/")
        assert TOKEN not in done.stdout + done.stderr
        repo = state.repos["models/org/stars"]
        assert repo.private
        assert repo.files["model.safetensors"] == (exported / "model.safetensors").read_bytes()
        assert state.sent, "large files go by LFS"
        assert MARKER in {path.name for path in exported.iterdir()}
        assert MARKER not in repo.files
        assert MARKER not in done.stdout
        loaded = processes.run("-c", LOAD, hub=True)
        assert loaded.returncode == 0, loaded.stderr[-3000:]
        difference, size = json.loads(loaded.stdout.splitlines()[-1])
        assert difference < 1e-6
        assert size == 40


def test_what_exists_is_not_overwritten_unasked(exported, tmp_path):
    with hub() as (_, state):
        assert run("push", str(exported), "org/stars", "--yes").returncode == 0
        before = state.repos["models/org/stars"].commits
        refused = run("push", str(exported), "org/stars")
        assert refused.returncode == 1
        assert "'org/stars' has" in refused.stderr
        assert "or overwrite them with --yes" in refused.stderr
        assert state.repos["models/org/stars"].commits == before
        proposed = run("push", str(exported), "org/stars", "--create-pr")
        assert proposed.returncode == 0, proposed.stderr[-2000:]
        assert proposed.stdout.strip().endswith("/org/stars/discussions/1")


def test_a_connection_that_is_cut_is_resumed(exported, tmp_path):
    copy = tmp_path / "model"
    shutil.copytree(exported, copy)
    (copy / "more.txt").write_text("x" * 50_000)
    with hub() as (_, state):
        state.cut_after = 1
        cut = run("push", str(copy), "org/stars", "--yes")
        assert cut.returncode == 1
        last = cut.stderr.strip().splitlines()[-1]
        assert last.startswith("Error: "), cut.stderr[-2000:]
        assert "Push again; files that arrived are not sent again" in last
        arrived = list(state.sent)
        state.cut_after = None
        done = run("push", str(copy), "org/stars", "--yes")
        assert done.returncode == 0, done.stderr[-2000:]
        assert len(state.sent) == len(set(state.sent)) > len(arrived), "nothing arrived twice"


def test_a_branch_is_made(exported, tmp_path):
    with hub() as (_, state):
        done = run("push", str(exported), "org/stars", "--revision", "stage 2", "--yes")
        assert done.returncode == 0, done.stderr[-2000:]
        assert "POST /api/models/org/stars/branch/stage 2" in state.asked
        assert "POST /api/models/org/stars/commit/stage 2" in state.asked


def test_another_name_than_the_cards_is_noted(exported, tmp_path):
    with hub():
        done = run("push", str(exported), "org/stars", "--yes")
        assert "Note: its card loads 'model'. To change that, export with --repo-id org/stars." in done.stdout


def test_a_full_disk_here(exported, small_disk, tmp_path):
    """What is published is read and not copied, so a full disk does not matter; it does for an export."""
    with (small_disk / "filled").open("wb") as file:
        file.write(bytes(290_000))
    with hub() as (_, state):
        forget_hub(small_disk / "home")
        done = run("push", str(exported), "org/stars", "--yes")
        assert done.returncode == 0, done.stderr[-2000:]
        assert "model.safetensors" in state.repos["models/org/stars"].files
        full = run("export", str(exported), str(small_disk / "out"), "--no-onnx")
        assert full.returncode == 1
        assert full.stderr.strip().splitlines()[-1].startswith(f"Error: Cannot write to {small_disk / 'out'} (")
        assert [path.name for path in small_disk.iterdir() if path.name not in ("filled", "home")] == []


def test_a_wrong_token_and_no_hub(exported, tmp_path):
    with hub():
        wrong = run("push", str(exported), "org/stars", "--yes", token="hf_wrong")
        assert wrong.returncode == 1
        assert "You may not write to 'org/stars' (401). Log in with a token that may" in wrong.stderr
        assert "hf_wrong" not in wrong.stderr
        named = run("push", str(exported), "a/b/c", "--yes")
        assert "'a/b/c' is not the name of a repository. Write organisation/name." in named.stderr
    gone = run("push", str(exported), "org/stars", "--yes")
    assert gone.returncode == 1
    assert "The connection to the Hub was lost" in gone.stderr


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("weights.bin", b"x", "'weights.bin' is a pickle"),
        ("notes.txt", b"token: hf_" + b"a" * 34, "'notes.txt' holds what looks like a secret"),
        ("notes.ipynb", b'"a\\nsk-' + b"a" * 34, "'notes.ipynb' holds what looks like a secret"),
        ("key.pem", b"-----BEGIN RSA PRIVATE KEY-----", "'key.pem' holds what looks like a secret"),
    ],
)
def test_what_should_not_be_there_is_named(exported, tmp_path, name, content, message):
    copy = tmp_path / "model"
    shutil.copytree(exported, copy)
    (copy / name).write_bytes(content)
    with pytest.raises(PushError, match=message):
        validate_folder(copy)
    (copy / name).unlink()
    names = b"dusk-over-the-harbour-of-hamburg-germany.jpg, half_" + b"a" * 34
    (copy / "names.txt").write_bytes(names)
    assert validate_folder(copy).files["model.safetensors"] > 0
    (copy / "link.txt").symlink_to("/etc/hostname")
    with pytest.raises(PushError, match=r"'link\.txt' is a link to a file outside the folder"):
        validate_folder(copy)
    with pytest.raises(PushError, match="is not an exported model"):
        validate_folder(tmp_path)
