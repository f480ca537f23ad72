"""Encoding speed on a CPU against the same work in sentence-transformers, ONNX Runtime and transformers.

Run: python benchmarks/peers/encoding.py [--texts 256] [--images 96] [--width 384] [--layers 6] [--rounds 5]

Prints one JSON line. The peers have the same width and layers: a BERT for texts, mean pooled, in sentence-transformers
and, with texts sorted by length, in ONNX Runtime; a CLIP image tower in transformers. Every way first runs once with
each of its batch sizes, then all run in turn with their fastest. Ratios are of times: peer over ours, above 1 if ours
is faster; "per multiplication" also divides by the multiplications of both models (without padding), since a layer of
ours has 4/3 of those of a BERT layer of the same width. bfloat16 is measured where the processor multiplies in it.
"""

import argparse
import io
import json
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import model_of, photos, processor_of, spread, texts
from PIL import Image

SIDE = 224
LONGEST = 512
BATCHES = (1, 2, 4, 8, 16, 32)
Way = Callable[[int], Any]  # encodes everything in batches of a size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("texts", 256), ("images", 96), ("width", 384), ("layers", 6), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--only", choices=["text", "image"])
    options = parser.parse_args()
    from bifocal.modeling.dtype_bifocal import multiplies_in_bfloat16

    halves = multiplies_in_bfloat16("cpu")
    names = ("torch", "transformers", "sentence-transformers", "onnxruntime")
    line: dict[str, Any] = {
        "benchmark": "peers/encoding", **vars(options), "threads": torch.get_num_threads(),
        "processor": platform.processor() or platform.machine(), "bfloat16": halves,
        "versions": {name: version(name) for name in names},
    }  # fmt: skip
    model, processor = model_of(options.width, options.layers, SIDE).eval(), processor_of(SIDE)
    model.processor = processor
    half = model_of(options.width, options.layers, SIDE).eval().bfloat16() if halves else None
    with tempfile.TemporaryDirectory() as scratch:
        if options.only != "image":
            line["text"] = compare_texts(options, model, half, Path(scratch))
        if options.only != "text":
            line["image"] = compare_images(options, model, half)
    print(json.dumps(line))


def compare_texts(options: argparse.Namespace, model: Any, half: Any, scratch: Path) -> dict[str, Any]:
    from sentence_transformers import SentenceTransformer

    from bifocal.hub.export import export_model

    tokenizer = model.processor.tokenizer
    words = texts(options.texts, 40, 400)
    lengths = [len(ids) for ids in tokenizer(words, truncation=True, max_length=LONGEST)["input_ids"]]
    adapter = SentenceTransformer(str(export_model(model, scratch / "model", model.processor)), device="cpu")
    bert = save_bert(options, tokenizer, scratch / "bert")
    ways: dict[str, Way] = {
        "ours": lambda batch: model.encode_text(words, batch_size=batch, show_progress=False),
        "ours through sentence-transformers": lambda batch: adapter.encode(
            words, batch_size=batch, show_progress_bar=False
        ),
        "sentence-transformers": by_sentence_transformers(scratch / "bert", words),
        "ONNX Runtime": by_onnx_runtime(bert, scratch / "bert.onnx", tokenizer, words),
    }
    if half is not None:
        half.processor = model.processor
        ways["ours, bfloat16"] = lambda batch: half.encode_text(words, batch_size=batch, show_progress=False)
    difference = np.abs(ways["sentence-transformers"](8) - ways["ONNX Runtime"](8)).max()
    if difference > 1e-5:
        raise ArithmeticError(f"The two peers' vectors differ by {difference}.")
    width = options.width
    # Of each token: the matrices of a layer, and the scores and sums of attention over its text.
    attention = sum(2 * width * length * length for length in lengths)
    ours, theirs = (options.layers * (sum(lengths) * parts * width**2 + attention) for parts in (16, 12))
    result = in_turn(ways, options.rounds, options.texts)
    result |= {
        "tokens": {"all": sum(lengths), "longest": max(lengths), "shortest": min(lengths)},
        "multiplications of ours over the peers'": round(ours / theirs, 3),
    }
    for peer in ("sentence-transformers", "ONNX Runtime"):
        result[f"{peer} over ours, per multiplication"] = spread(
            [value * ours / theirs for value in result["ratios"][f"{peer} over ours"]]
        )
    if half is not None:
        turns = zip(result["ratios"]["sentence-transformers over ours"], result["ratios"]["ours, bfloat16 over ours"],
                    strict=True)  # fmt: skip
        result["sentence-transformers over ours, bfloat16"] = spread([theirs / ours for theirs, ours in turns])
        vectors = ways["ours"](8), ways["ours, bfloat16"](8)
        result["lowest cosine of bfloat16"] = float((vectors[0] * vectors[1]).sum(1).min())
    return shortened(result)


def compare_images(options: argparse.Namespace, model: Any, half: Any) -> dict[str, Any]:
    loaded = [Image.open(io.BytesIO(file)).convert("RGB") for file in photos(options.images, 500, 375)]
    ways: dict[str, Way] = {
        "ours": lambda batch: model.encode_image(loaded, batch_size=batch, show_progress=False),
        "CLIP": by_clip(options, model.processor.image_processor, loaded),
    }
    if half is not None:
        half.processor = model.processor
        ways["ours, bfloat16"] = lambda batch: half.encode_image(loaded, batch_size=batch, show_progress=False)
    result = in_turn(ways, options.rounds, options.images)
    if half is not None:
        vectors = ways["ours"](8), ways["ours, bfloat16"](8)
        result["lowest cosine of bfloat16"] = float((vectors[0] * vectors[1]).sum(1).min())
    return shortened(result)


def in_turn(ways: dict[str, Way], rounds: int, count: int) -> dict[str, Any]:
    """Return each way's best batch size, its rows per second with it, and the ratios of times to ours."""
    best = {}
    for name, way in ways.items():
        way(BATCHES[-1])  # a warm-up
        tried = {batch: seconds(way, batch) for batch in BATCHES}
        best[name] = min(tried, key=tried.__getitem__)
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            taken[name].append(seconds(way, best[name]))
    return {
        "batch sizes tried": BATCHES, "best batch size": best,
        "per second": {name: spread([count / value for value in values]) for name, values in taken.items()},
        "ratios": {
            f"{name} over ours": [theirs / ours for theirs, ours in zip(values, taken["ours"], strict=True)]
            for name, values in taken.items() if name != "ours"
        },
    }  # fmt: skip


def seconds(way: Way, batch: int) -> float:
    started = time.perf_counter()
    way(batch)
    return time.perf_counter() - started


def shortened(result: dict[str, Any]) -> dict[str, Any]:
    return result | {"ratios": {name: spread(values) for name, values in result["ratios"].items()}}


def save_bert(options: argparse.Namespace, tokenizer: Any, folder: Path) -> Any:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    peer = BertModel(
        BertConfig(
            vocab_size=1024, hidden_size=options.width, num_hidden_layers=options.layers,
            max_position_embeddings=LONGEST, num_attention_heads=options.width // 64,
            intermediate_size=4 * options.width,
        ),
        add_pooling_layer=False,
    ).eval()  # fmt: skip
    peer.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return peer


def by_sentence_transformers(folder: Path, words: list[str]) -> Way:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    tower = Transformer(str(folder), max_seq_length=LONGEST)
    peer = SentenceTransformer(modules=[tower, Pooling(tower.get_embedding_dimension())], device="cpu")
    return lambda batch: peer.encode(words, batch_size=batch, show_progress_bar=False, normalize_embeddings=True)


def by_onnx_runtime(bert: Any, file: Path, tokenizer: Any, words: list[str]) -> Way:
    import onnxruntime

    inputs = tokenizer(["a red circle", "star"], padding=True, return_tensors="pt")
    names = ("input_ids", "attention_mask")
    shape = {0: torch.export.Dim("batch", min=1), 1: torch.export.Dim("length", min=2, max=LONGEST)}
    torch.onnx.export(
        bert, (), str(file), kwargs={name: inputs[name] for name in names}, dynamic_shapes=dict.fromkeys(names, shape),
        dynamo=True, verbose=False, input_names=list(names), output_names=["states"], opset_version=20,
    )  # fmt: skip
    session_options = onnxruntime.SessionOptions()
    session_options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(file), session_options, providers=["CPUExecutionProvider"])

    def encode(batch: int) -> np.ndarray:
        rows = tokenizer(words, truncation=True, max_length=LONGEST)["input_ids"]
        order = sorted(range(len(rows)), key=lambda row: -len(rows[row]))
        vectors = np.empty((len(rows), bert.config.hidden_size), np.float32)
        for start in range(0, len(order), batch):
            chosen = order[start : start + batch]
            ids, mask = padded([rows[row] for row in chosen])
            states = session.run(["states"], {"input_ids": ids, "attention_mask": mask})[0]
            weights = mask[..., None].astype(np.float32)
            vectors[chosen] = (states * weights).sum(1) / weights.sum(1)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    return encode


def padded(rows: Sequence[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    ids = np.zeros((len(rows), max(map(len, rows))), np.int64)
    mask = np.zeros_like(ids)
    for row, tokens in enumerate(rows):
        ids[row, : len(tokens)] = tokens
        mask[row, : len(tokens)] = 1
    return ids, mask


def by_clip(options: argparse.Namespace, image_processor: Any, loaded: list[Image.Image]) -> Way:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(0)
    peer = CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=options.width, num_hidden_layers=options.layers, num_attention_heads=options.width // 64,
            intermediate_size=4 * options.width, image_size=SIDE, patch_size=16, projection_dim=options.width,
        )
    ).eval()  # fmt: skip

    @torch.no_grad()
    def encode(batch: int) -> torch.Tensor:
        parts = []
        for start in range(0, len(loaded), batch):
            inputs = image_processor(loaded[start : start + batch], return_tensors="pt")
            parts.append(torch.nn.functional.normalize(peer(**inputs).image_embeds, dim=-1))
        return torch.cat(parts)

    return encode


if __name__ == "__main__":
    main()
