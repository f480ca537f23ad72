"""Encoding texts of mixed lengths and photos, against BERT and CLIP's image tower of transformers in their usual use.

Run: python benchmarks/peers/encoding.py [--texts 256] [--images 96] [--width 384] [--layers 6] [--rounds 5]

Prints one JSON line. Ours are `encode_text`, `encode_image` and the sentence-transformers path; the peers have the
same width and layers. Usual use of BERT: batches of 32 texts in input order, padded to the longest, mean pooling; of
CLIP: its processor, batches of 32. All run in one process, in turn, after a warm-up. Ratios are of times: peer over
ours, above 1 if ours is faster.
"""

import argparse
import io
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import model_of, photos, processor_of, spread, texts
from PIL import Image

BATCH = 32
SIDE = 224


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("texts", 256), ("images", 96), ("width", 384), ("layers", 6), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    from sentence_transformers import SentenceTransformer

    from bifocal.hub.export import export_model

    model, processor = model_of(options.width, options.layers, SIDE).eval(), processor_of(SIDE)
    model.processor = processor
    words = texts(options.texts, 40, 400)
    lengths = [len(ids) for ids in processor.tokenizer(words, truncation=True, max_length=512)["input_ids"]]
    loaded = [Image.open(io.BytesIO(file)).convert("RGB") for file in photos(options.images, 500, 375)]
    with tempfile.TemporaryDirectory() as scratch:
        adapter = SentenceTransformer(str(export_model(model, Path(scratch) / "model", processor)), device="cpu")
        ways: dict[str, tuple[Callable[[], Any], ...]] = {
            "text": (
                lambda: model.encode_text(words, batch_size=BATCH, show_progress=False),
                lambda: adapter.encode(words, batch_size=BATCH, show_progress_bar=False),
                _bert(options, processor.tokenizer, words),
            ),
            "image": (
                lambda: model.encode_image(loaded, batch_size=BATCH, show_progress=False),
                lambda: adapter.encode(loaded, batch_size=BATCH, show_progress_bar=False),
                _clip(options, processor.image_processor, loaded),
            ),
        }
        line: dict[str, Any] = {
            "benchmark": "peers/encoding", **vars(options), "tokens": {"median": sorted(lengths)[len(lengths) // 2],
            "longest": max(lengths), "shortest": min(lengths)},
        }  # fmt: skip
        for kind, three in ways.items():
            seconds: list[list[float]] = [[], [], []]
            for turn in range(options.rounds + 1):
                for number, way in enumerate(three):
                    started = time.perf_counter()
                    way()
                    if turn:  # the first round is a warm-up
                        seconds[number].append(time.perf_counter() - started)
            ours, by_adapter, peer = seconds
            count = options.texts if kind == "text" else options.images
            line[kind] = {
                "per_second": spread([count / value for value in ours]),
                "peer_over_ours": spread([p / o for p, o in zip(peer, ours, strict=True)]),
                "peer_over_sentence_transformers": spread([p / a for p, a in zip(peer, by_adapter, strict=True)]),
            }
    print(json.dumps(line))


def _bert(options: argparse.Namespace, tokenizer: Any, words: list[str]) -> Callable[[], torch.Tensor]:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    peer = BertModel(
        BertConfig(
            vocab_size=1024, hidden_size=options.width, num_hidden_layers=options.layers, max_position_embeddings=512,
            num_attention_heads=options.width // 64, intermediate_size=4 * options.width,
        ),
        add_pooling_layer=False,
    ).eval()  # fmt: skip

    @torch.no_grad()
    def encode() -> torch.Tensor:
        parts = []
        for start in range(0, len(words), BATCH):
            inputs = tokenizer(
                words[start : start + BATCH], padding=True, truncation=True, max_length=512, return_tensors="pt"
            )
            states = peer(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).last_hidden_state
            mask = inputs["attention_mask"].unsqueeze(-1).float()
            parts.append(torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1))
        return torch.cat(parts)

    return encode


def _clip(options: argparse.Namespace, image_processor: Any, loaded: list[Image.Image]) -> Callable[[], torch.Tensor]:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(0)
    peer = CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=options.width, num_hidden_layers=options.layers, num_attention_heads=options.width // 64,
            intermediate_size=4 * options.width, image_size=SIDE, patch_size=16, projection_dim=options.width,
        )
    ).eval()  # fmt: skip

    @torch.no_grad()
    def encode() -> torch.Tensor:
        parts = []
        for start in range(0, len(loaded), BATCH):
            inputs = image_processor(loaded[start : start + BATCH], return_tensors="pt")
            parts.append(torch.nn.functional.normalize(peer(**inputs).image_embeds, dim=-1))
        return torch.cat(parts)

    return encode


if __name__ == "__main__":
    main()
