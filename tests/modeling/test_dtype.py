"""bfloat16 by the hardware, and the vectors of 16 bits next to those of float32."""

import platform
from typing import get_args

import numpy as np
import pytest
import torch

from bifocal import fast_dtype
from bifocal.dtypes import DtypeChoice
from bifocal.embedding.models import load_model
from bifocal.modeling import BifocalModel
from bifocal.modeling.dtype_bifocal import DTYPE_CHOICES, multiplies_in_bfloat16, resolve_dtype
from tests import families
from tests.conftest import TEXTS
from tests.evaluation.test_encoders import sentence_model
from tests.modeling.test_images import photo


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ((), False),
        (("avx2", "avx512_f", "avx512_bw", "avx512_vl", "avx512_vnni"), False),  # torch would emulate it
        (("avx2", "avx_ne_convert"), False),  # which converts, but does not multiply
        (("avx512_f", "avx512_bf16"), True),
        (("avx512_f", "amx_tile", "amx_bf16"), True),
        (("neon", "fp16_arith"), False),
        (("neon", "bf16"), True),
    ],
)
def test_the_processor_decides(cpu_with, names, expected):
    cpu_with(*names)
    assert multiplies_in_bfloat16("cpu") is expected
    if not torch.cuda.is_available():
        assert fast_dtype() == (torch.bfloat16 if expected else torch.float32)


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        ("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_VNNI", False),
        ("ONEDNN_MAX_CPU_ISA", "avx2", False),
        ("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16", True),
        ("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_AMX", True),
        ("ONEDNN_MAX_CPU_ISA", "DEFAULT", True),
        ("DNNL_MAX_CPU_ISA", "AVX512_CORE", False),
        ("ATEN_CPU_CAPABILITY", "avx2", False),
        ("ATEN_CPU_CAPABILITY", "default", False),
        ("ATEN_CPU_CAPABILITY", "avx512", True),
    ],
)
def test_variables_that_forbid_the_instructions_count(cpu_with, monkeypatch, variable, value, expected):
    cpu_with("avx512_bf16", "amx_bf16")
    monkeypatch.setenv(variable, value)
    assert multiplies_in_bfloat16("cpu") is expected


def test_without_onednn_nothing_uses_the_instructions(cpu_with, monkeypatch):
    cpu_with("avx512_bf16")
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not multiplies_in_bfloat16("cpu")


@pytest.mark.parametrize(("machine", "expected"), [("x86_64", False), ("aarch64", True)])
def test_older_torch(cpu_with, monkeypatch, machine, expected):
    """Its check for oneDNN is also true for plain AVX512."""
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    assert multiplies_in_bfloat16("cpu") is expected
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert multiplies_in_bfloat16("cpu")


def test_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not multiplies_in_bfloat16("cuda"), "there is none"
    asked = []

    class OnDevice:
        def __init__(self, device: torch.device) -> None:
            asked.append(device)

        __enter__ = __exit__ = lambda self, *_: None

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device", OnDevice)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert not multiplies_in_bfloat16("cuda:1"), "emulation does not count"
    assert asked == [torch.device("cuda:1")]
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    assert fast_dtype() == torch.bfloat16
    assert not multiplies_in_bfloat16("mps")


def test_choices(cpu_with):
    assert get_args(DtypeChoice) == DTYPE_CHOICES
    cpu_with()
    assert [resolve_dtype(choice, "cpu") for choice in (None, "model", "auto", "float16")] == [
        "model", "model", "model", "float16",
    ]  # fmt: skip
    cpu_with("avx512_bf16")
    assert resolve_dtype("auto", "cpu") == "bfloat16"
    with pytest.raises(ValueError, match="The dtype is 'half', but it must be one of model, auto, float32"):
        resolve_dtype("half", "cpu")


def cosines(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    assert second.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(second, axis=-1), 1.0, atol=1e-5)
    return (first * second).sum(-1)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", ["Bifocal", *families.DUAL_ENCODERS])
def test_vectors_of_joint_models(saved, tmp_path, family, dtype):
    """Small towers with random weights; 0.9999 and more where they are of a useful size (benchmarks/dtypes.py)."""
    if family != "Bifocal":
        families.save(family, tmp_path)
    folder = str(saved if family == "Bifocal" else tmp_path)
    texts, images = (TEXTS if family == "Bifocal" else families.TEXTS), [photo(40, 32), photo(64, 64), photo(32, 50)]
    full, half = load_model(folder).model, load_model(folder, dtype).model
    assert isinstance(half, BifocalModel)
    assert {p.dtype for p in half.parameters()} == {getattr(torch, dtype)}
    assert cosines(full.encode_text(texts), half.encode_text(texts)).min() > 0.9995
    assert cosines(full.encode_image(images), half.encode_image(images)).min() > 0.9995
    assert load_model(folder, "model").model.dtype == torch.float32


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_vectors_of_sentence_transformers(tmp_path, dtype):
    families.save("BERT", tmp_path / "bert")
    sentence_model(tmp_path / "bert", tmp_path / "sentences")
    options = dict(normalize_embeddings=True, show_progress_bar=False)
    full, half = (load_model(str(tmp_path / "sentences"), name).model for name in (None, dtype))
    assert half.dtype == getattr(torch, dtype)
    assert cosines(full.encode(families.TEXTS, **options), half.encode(families.TEXTS, **options)).min() > 0.9995


def test_a_slow_dtype_is_named_once(saved, cpu_with, caplog):
    from transformers.utils import logging

    cpu_with()
    logging.get_logger("transformers").warning_once.__func__.cache_clear()
    for _ in range(2):
        load_model(str(saved), "bfloat16", "cpu")
    assert caplog.text.count("This processor does not multiply in bfloat16, so float32 would be faster.") == 1
    cpu_with("avx512_bf16")
    caplog.clear()
    load_model(str(saved), "bfloat16", "cpu")
    load_model(str(saved), "auto", "cpu")
    assert "multiply" not in caplog.text
