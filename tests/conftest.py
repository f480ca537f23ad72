"""Small seeded models shared by the tests."""

import gc
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may reach the network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:
    # The workers share the cores, and so do the processes that they start.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)

from bifocal.modeling import BifocalConfig, BifocalModel, BifocalProcessor
from bifocal.training.tokenizer import train_wordpiece
from tests import processes

# Real data next to the project, for those who have it; tests that need it are skipped elsewhere.
SHARED = Path(os.environ.get("BIFOCAL_SHARED_DATA") or Path(__file__).parents[2] / "shared" / "data")

TEXTS = [
    "latin small letter a with acute",
    "greek capital letter omega",
    "black star",
    "box drawings heavy down and horizontal",
    "a long description of a sign that goes on for rather more words than any of the others here do",
]
# Well over the 64 tokens of `small_config`; what comes after them would change the vector if it were read.
LONG = " ".join([*TEXTS * 4, *(word.upper() for word in reversed(TEXTS * 4))])
EMPTY = ""
SHARED_TOKENIZERS: list = []


def small_config(**changes) -> BifocalConfig:
    settings: dict = {
        "text_config": {
            "vocab_size": 320, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6,
            "intermediate_size": 80, "max_position_embeddings": 64, "hidden_dropout_prob": 0.0,
        },
        "vision_config": {
            "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 72,
            "image_size": 32, "patch_size": 8, "patch_dropout": 0.0,
        },
        "projection_dim": 40, "text_projection": True,
    }  # fmt: skip
    for key, value in changes.items():
        settings[key] = {**settings.get(key, {}), **value} if isinstance(value, dict) else value
    return BifocalConfig(**settings)


def pytest_collection_finish() -> None:
    """Spare the garbage collector what the imports made: accelerate calls it after each training, 0.4 s at a time."""
    gc.freeze()


@pytest.fixture(scope="session")
def processor() -> BifocalProcessor:
    from bifocal.modeling.processing_bifocal import image_processor_of_size

    tokenizer = train_wordpiece(TEXTS * 10, 300, max_length=64)
    SHARED_TOKENIZERS.append(tokenizer)
    images = image_processor_of_size(32)
    return BifocalProcessor(images, tokenizer)


@pytest.fixture(autouse=True)
def same_tokenizer():
    """Leave the shared tokenizer as it was: it keeps the truncation and padding of its last call, and saves them."""
    yield
    for tokenizer in SHARED_TOKENIZERS:
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()


@pytest.fixture
def cpu_with(monkeypatch) -> Callable[..., None]:
    """Sets the capabilities of the CPU by name, by which bfloat16 is chosen; no machine decides what a test sees."""
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)

    def change(*names: str) -> None:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(names, True), raising=False)

    return change


@pytest.fixture
def model(processor) -> BifocalModel:
    torch.manual_seed(0)
    built = BifocalModel(small_config()).eval()
    built.processor = processor
    return built


@pytest.fixture(scope="session")
def saved(processor, tmp_path_factory) -> Path:
    """A folder with a small seeded model and its processor."""
    folder = tmp_path_factory.mktemp("saved") / "small-model"
    torch.manual_seed(0)
    BifocalModel(small_config()).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def desk(tmp_path, saved) -> Path:
    """A working directory next to a model, where commands are called."""
    (tmp_path / "model").symlink_to(saved)
    return tmp_path


@pytest.fixture
def inputs(processor) -> dict[str, torch.Tensor]:
    """Padded texts and random images, five of each."""
    generator = torch.Generator().manual_seed(1)
    encoded = processor.tokenizer(TEXTS, padding=True, return_tensors="pt")
    return {
        "input_ids": encoded["input_ids"],
        "attention_mask": encoded["attention_mask"],
        "pixel_values": torch.randn(len(TEXTS), 3, 32, 32, generator=generator),
    }


@pytest.fixture
def quick_check(monkeypatch) -> None:
    """Give `check_folder` a process with the imports done; tests without this fixture start one as a user does."""

    def start(command: list[str], *, env: dict[str, str], cwd: str, **_: object) -> subprocess.CompletedProcess:
        return processes.run(*command[1:], cwd=cwd, **env)

    monkeypatch.setattr("bifocal.hub.check.subprocess.run", start)


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of 300 KiB; needs the right to mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)
