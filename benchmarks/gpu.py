"""Throughput, memory and largest batch on your GPU, in float32 and bfloat16, compiled or not.

Run: python benchmarks/gpu.py [--device cuda] [--batch 256] [--small] [--json]

Prints a table, and a JSON line with --json. Each row is measured after a warm-up, until the device has finished. A row
that a device or an installed version cannot run shows the error. Without a GPU, `--device cpu --small` tests the
script; its figures mean nothing.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent / "peers"))

from common import model_of, photos, processor_of, texts

from bifocal.errors import first_line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--small", action="store_true", help="towers of two layers")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("There is no CUDA device here; --device cpu --small tests the script.")
    width, layers, side = (64, 2, 32) if options.small else (768, 12, 224)
    rows: list[dict[str, Any]] = []
    for what, dtype, implementation, compiled in (
        ("encode text, 512 tokens", torch.float32, "sdpa", False),
        ("encode text, 512 tokens", torch.bfloat16, "sdpa", False),
        ("encode text, 512 tokens", torch.bfloat16, "sdpa", True),
        ("encode text, 512 tokens", torch.bfloat16, "flex_attention", True),
        ("encode images", torch.float32, "sdpa", False),
        ("encode images", torch.bfloat16, "sdpa", False),
        ("encode images", torch.bfloat16, "sdpa", True),
        ("train, plain", torch.bfloat16, "sdpa", False),
        ("train, gradient cache", torch.bfloat16, "sdpa", False),
        ("train, gradient cache that keeps graphs", torch.bfloat16, "sdpa", False),
        ("texts to vectors", torch.bfloat16, "sdpa", False),
        ("JPEGs to vectors, no workers", torch.bfloat16, "sdpa", False),
        ("JPEGs to vectors", torch.bfloat16, "sdpa", False),
        ("JPEGs to vectors, decoded at reduced scale", torch.bfloat16, "sdpa", False),
        ("train, 8 long texts", torch.bfloat16, "sdpa", False),
        ("train, 8 long texts", torch.bfloat16, "flex_attention", False),
    ):
        batch = 8 if "long texts" in what else options.batch
        row = {
            "what": what, "dtype": str(dtype).removeprefix("torch."), "attention": implementation,
            "compiled": compiled, "batch": batch,
        }  # fmt: skip
        try:
            row |= _measure(what, dtype, implementation, compiled, device, batch, (width, layers, side))
        except Exception as error:  # what a device cannot do is a result
            row["failed"] = first_line(error)[:100]
        rows.append(row)
        _empty_cache(device)
    rows.append(_largest(device, (width, layers, side), 1024 if options.small else 65536))
    _print(rows, device)
    if options.json:
        print(json.dumps({"benchmark": "gpu", "device": _name(device), "torch": torch.__version__, "rows": rows}))


def _measure(
    what: str, dtype: torch.dtype, implementation: str, compiled: bool, device: torch.device, batch: int,
    size: tuple[int, int, int],
) -> dict[str, float]:  # fmt: skip
    model = model_of(*size).to(device)
    model.set_attn_implementation(implementation)
    if "to vectors" in what:
        return _end_to_end(what, model.to(dtype).eval(), batch, size[2])
    tokens = (2048 if size[0] > 64 else 128) if "long texts" in what else 64 if what.startswith("train") else 512
    ids = torch.randint(5, 1000, (batch, tokens), device=device)
    pixels = torch.randn(batch, 3, size[2], size[2], device=device)
    if "long texts" in what:
        call = _long_text_step(model.text_model.train(), ids, dtype)
    elif what.startswith("train"):
        call = _step(model, ids, pixels, dtype, 32 if "cache" in what else None, keep="keeps" in what)
    else:
        model = model.to(dtype).eval()
        encode: Callable[..., Any] = model.get_text_features if "text" in what else model.get_image_features
        inputs = ids if "text" in what else pixels.to(dtype)
        if compiled:
            encode = torch.compile(encode)

        def call() -> None:
            with torch.no_grad():
                encode(inputs)

    for _ in range(3):
        call()
    _empty_cache(device, peak=True)
    started, repeats = time.perf_counter(), 5
    for _ in range(repeats):
        call()
    _wait(device)
    seconds = (time.perf_counter() - started) / repeats
    return {"per_second": round(batch / seconds, 1), "peak_mib": _peak(device)}


def _end_to_end(what: str, model: Any, batch: int, side: int) -> dict[str, float]:
    """Measure `encode_text` or `encode_image` from texts of mixed lengths or from files of photos, four batches."""
    model.processor = processor_of(side)
    if "texts" in what:
        items: list[Any] = texts(4 * batch, 40, 400)
        encode = model.encode_text
        options: dict[str, Any] = {}
    else:
        items = [file for file in photos(64, 500, 375) for _ in range(4 * batch // 64 or 1)]
        encode = model.encode_image
        options = {
            "num_workers": 0 if "no workers" in what else None, "fast_decoding": "reduced" in what,
        }  # fmt: skip

    def call() -> None:
        encode(items, batch_size=batch, show_progress=False, **options)

    call()
    _empty_cache(model.device, peak=True)
    started = time.perf_counter()
    call()
    _wait(model.device)
    return {"per_second": round(len(items) / (time.perf_counter() - started), 1), "peak_mib": _peak(model.device)}


def _step(
    model: Any, ids: torch.Tensor, pixels: torch.Tensor, dtype: torch.dtype, chunk: int | None, keep: bool = False
) -> Callable[[], None]:
    from bifocal.training.engine.gradient_cache import cached_step, into_chunks
    from bifocal.training.engine.joint_forward import embed
    from bifocal.training.losses import info_nce

    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    text_inputs = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]
    image_inputs = [{"pixel_values": pixels}]

    def precision() -> Any:
        return torch.autocast(ids.device.type, dtype)

    def objective(embedded: dict[str, torch.Tensor]) -> torch.Tensor:
        return info_nce(embedded["texts"].float(), embedded["images"].float(), 1.0 / embedded["scale"])

    def call() -> None:
        if chunk is None:
            with precision():
                loss = objective(embed(model, text_inputs, image_inputs))
            loss.backward()
        else:
            chunks = into_chunks(text_inputs, image_inputs, chunk, chunk)

            def forward(part_of_texts: Any, part_of_images: Any) -> Any:
                with precision():
                    return embed(model, part_of_texts, part_of_images)

            cached_step(
                chunks, forward, objective, lambda scalar: scalar.backward(), nullcontext,
                num_kept=len(chunks) if keep else 0,
            )  # fmt: skip
        optimizer.step()
        optimizer.zero_grad()

    return call


def _long_text_step(tower: Any, ids: torch.Tensor, dtype: torch.dtype) -> Callable[[], None]:
    """Return a step, forward and backward, of texts of a quarter of the tokens to all of them (2,048 at full size)."""
    lengths = torch.linspace(ids.shape[1] / 4, ids.shape[1], len(ids), device=ids.device)
    mask = (torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]).long()

    def call() -> None:
        with torch.autocast(ids.device.type, dtype):
            pooled = tower(ids, mask).pooler_output
        pooled.float().square().sum().backward()
        tower.zero_grad()

    return call


def _largest(device: torch.device, size: tuple[int, int, int], limit: int) -> dict[str, Any]:
    """Return the largest batch, doubled until memory is out, that the gradient cache trains."""
    batch, largest, seconds = 256, 0, 0.0
    failed = ""
    while batch <= limit:
        try:
            model = model_of(*size).to(device)
            ids = torch.randint(5, 1000, (batch, 64), device=device)
            pixels = torch.randn(batch, 3, size[2], size[2], device=device)
            call = _step(model, ids, pixels, torch.bfloat16, 64)
            started = time.perf_counter()
            call()
            _wait(device)
            largest, seconds = batch, time.perf_counter() - started
        except (torch.OutOfMemoryError, RuntimeError) as error:
            failed = first_line(error)[:100]
            break
        finally:
            model = ids = pixels = call = None  # type: ignore[assignment]
            _empty_cache(device)
        batch *= 2
    return {
        "what": "largest batch, gradient cache", "dtype": "bfloat16", "attention": "sdpa", "compiled": False,
        "batch": largest, "per_second": round(largest / seconds, 1) if seconds else 0.0, "peak_mib": _peak(device),
        "stopped by": failed or f"the limit of {limit:,}",
    }  # fmt: skip


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _empty_cache(device: torch.device, peak: bool = False) -> None:
    if device.type == "cuda":
        if not peak:
            torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        torch.cuda.synchronize(device)


def _peak(device: torch.device) -> int | None:
    return torch.cuda.max_memory_allocated(device) // 2**20 if device.type == "cuda" else None


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _print(rows: list[dict[str, Any]], device: torch.device) -> None:
    print(f"{_name(device)}, torch {torch.__version__}\n")
    print(f"{'':<44}{'dtype':<10}{'attention':<16}{'compiled':<10}{'batch':>7}{'per second':>12}{'peak MiB':>10}")
    for row in rows:
        shown = (
            f"  failed: {row['failed']}"
            if "failed" in row
            else f"{row['per_second']:>12,}{row['peak_mib'] if row['peak_mib'] is not None else '-':>10}"
        )
        print(
            f"{row['what']:<44}{row['dtype']:<10}{row['attention']:<16}{row['compiled']!s:<10}{row['batch']:>7,}{shown}"
        )


if __name__ == "__main__":
    main()
