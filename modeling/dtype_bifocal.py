# Copyright 2026 The Bifocal authors. Licensed under the Apache License, Version 2.0.
"""The dtype to embed and train in: bfloat16 where the hardware multiplies in it."""

import os
import platform
from typing import Any, Literal, get_args

import torch
from torch import nn
from transformers.utils import logging

logger = logging.get_logger(__name__)

# What a command's --dtype takes. "model" is the dtype of the model's weights, "auto" is bfloat16 where the device
# multiplies in it and "model" elsewhere.
DtypeChoice = Literal["model", "auto", "float32", "bfloat16", "float16"]
DTYPE_CHOICES = get_args(DtypeChoice)
# Values of environment variables that forbid the bfloat16 instructions of an x86 processor.
_WITHOUT_BFLOAT16 = {
    "ONEDNN_MAX_CPU_ISA": ("sse41", "avx", "avx2", "avx2_vnni", "avx2_vnni_2", "avx512_core", "avx512_core_vnni"),
    "ATEN_CPU_CAPABILITY": ("default", "avx2"),
}
_WITHOUT_BFLOAT16["DNNL_MAX_CPU_ISA"] = _WITHOUT_BFLOAT16["ONEDNN_MAX_CPU_ISA"]  # its older name


def multiplies_in_bfloat16(device: torch.device | str) -> bool:
    """Return whether a device has instructions for products of bfloat16 matrices.

    Elsewhere, torch converts them to float32 and back, which is slower than float32. On a CPU, this needs AVX512-BF16,
    AMX or ARM's BF16, which torch's oneDNN uses unless ONEDNN_MAX_CPU_ISA or ATEN_CPU_CAPABILITY forbids it.
    """
    device = torch.device(device)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            return False
        with torch.cuda.device(device):
            return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "xpu":
        return bool(torch.xpu.is_available() and torch.xpu.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and _cpu_multiplies_in_bfloat16()


def _cpu_multiplies_in_bfloat16() -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    if hasattr(torch.cpu, "get_capabilities"):
        known = torch.cpu.get_capabilities()
        x86, arm = known.get("avx512_bf16") or known.get("amx_bf16"), known.get("bf16")
    else:  # torch before 2.12
        x86 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        # On x86 this is also true for AVX512 without BF16.
        arm = platform.machine() in ("aarch64", "arm64") and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    forbidden = any(os.environ.get(name, "").lower() in values for name, values in _WITHOUT_BFLOAT16.items())
    return bool(arm or (x86 and not forbidden))


def default_device() -> str:
    """Return the device that commands embed on: a CUDA GPU if there is one, else the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def fast_dtype(device: torch.device | str | None = None) -> torch.dtype:
    """Return bfloat16 if a device multiplies in it, else float32, as in `from_pretrained(folder, dtype=fast_dtype())`.

    Args:
        device: that the model will run on; a CUDA GPU if there is one, else the CPU, when None.
    """
    return torch.bfloat16 if multiplies_in_bfloat16(device or default_device()) else torch.float32


def resolve_dtype(choice: str | None, device: torch.device | str) -> str:
    """Return the dtype that one of `DTYPE_CHOICES` means on a device: "model" or the name of a dtype.

    Args:
        choice: one of `DTYPE_CHOICES`; "model" when None.
        device: that the model will run on.

    Raises:
        ValueError: if the choice is unknown.
    """
    if choice is None:
        return "model"
    if choice not in DTYPE_CHOICES:
        raise ValueError(f"The dtype is '{choice}', but it must be one of {', '.join(DTYPE_CHOICES)}.")
    if choice == "auto":
        return "bfloat16" if multiplies_in_bfloat16(device) else "model"
    return choice


def loading_options(dtype: str, device: torch.device | str) -> dict[str, Any]:
    """Return the options of `from_pretrained` that load weights in a dtype; warn once if it is slow on the device.

    Args:
        dtype: as from `resolve_dtype`.
        device: that the model will run on.
    """
    if dtype == "model":
        return {}
    if not is_fast(dtype, device):
        logger.warning_once(f"This {_name_of(device)} does not multiply in {dtype}, so float32 would be faster.")
    return {"dtype": getattr(torch, dtype)}


def is_fast(dtype: str, device: torch.device | str) -> bool:
    """Return whether a device multiplies in a dtype; assume it for "model"."""
    if dtype == "bfloat16":
        return multiplies_in_bfloat16(device)
    return dtype != "float16" or torch.device(device).type != "cpu"


def _name_of(device: torch.device | str) -> str:
    return "processor" if torch.device(device).type == "cpu" else "GPU"


def dtype_name(model: nn.Module) -> str:
    """Return the name of the dtype of a model's weights, such as "float32"."""
    dtypes = (parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    return str(next(dtypes, torch.float32)).removeprefix("torch.")


def pool_in_float32(model: nn.Module) -> None:
    """Let the modules of a sentence-transformers model that follow its transformer compute in float32.

    They pool, project and normalise, which takes little time, and vectors come back in float32.
    """
    transformer, *others = model.children()
    for module in others:
        module.float()
    transformer.register_forward_hook(_outputs_in_float32)


def _outputs_in_float32(module: nn.Module, args: Any, features: Any) -> None:
    for name, value in list(features.items()):
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            features[name] = value.float()
