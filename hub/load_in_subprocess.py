"""Loads a folder in every way and prints how the vectors differ from its examples. Run by `check.py` in a subprocess.

It imports nothing of Bifocal, since users of the folder may not have it.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors.numpy import load_file

# ONNX Runtime holds the scores of all heads at once, some 10 GB for 8,192 tokens at base size. Texts longer than this
# are not encoded with it; only the length to which they are truncated is compared.
_MOST_TOKENS = 2048
Vectors = tuple[np.ndarray, np.ndarray]


def main(folder: Path) -> None:
    """Print a JSON object with `differences`, `failed` and `lowest_int8`."""
    inputs = json.loads((folder / "examples" / "inputs.json").read_text(encoding="utf-8"))
    images = [Image.open(folder / entry["image"]).convert("RGB") for entry in inputs if "image" in entry]
    expected = load_file(folder / "examples" / "vectors.safetensors")
    differences: dict[str, float] = {}
    failed: dict[str, str] = {}
    int8: float | None = None

    def vectors_of(way: str, encode: Any) -> Vectors | None:
        try:
            vectors = encode(folder, inputs, images, expected)
        except Exception as error:  # whatever it is, a user would meet it, too
            failed[way] = (str(error).strip().splitlines() or [type(error).__name__])[0]
            return None
        if [array.shape for array in vectors] != [expected["text"].shape, expected["image"].shape]:
            failed[way] = f"its vectors have the shapes {[array.shape for array in vectors]}"
            return None
        return vectors

    ways = {"AutoModel": _auto_model, "SentenceTransformer": _sentence_transformer}
    if (folder / "onnx").exists():
        ways |= {
            "ONNX, float32": _onnx(_by_processor, ""),
            "ONNX, int8": _onnx(_by_processor, "_int8"),
            "ONNX by tokenizer.json": _onnx(_by_tokenizer, ""),
        }
    for way, encode in ways.items():
        vectors = vectors_of(way, encode)
        if vectors is None:
            continue
        if way == "ONNX, int8":
            int8 = min(float((a * expected[k]).sum(1).min()) for a, k in zip(vectors, ("text", "image"), strict=True))
        else:
            differences[way] = max(float(np.abs(a - expected[k]).max()) for a, k in zip(vectors, ("text", "image")))
    print(json.dumps({"differences": differences, "failed": failed, "lowest_int8": int8}))


def _auto_model(folder: Path, inputs: list[dict], images: list[Image.Image], expected: dict) -> Vectors:
    from transformers import AutoModel

    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    return model.encode_text([entry["text"] for entry in inputs]), model.encode_image(images)


def _sentence_transformer(folder: Path, inputs: list[dict], images: list[Image.Image], expected: dict) -> Vectors:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), trust_remote_code=True, device="cpu")
    return model.encode([entry["text"] for entry in inputs]), model.encode(images)


def _by_processor(processor: Any, folder: Path, texts: list[str]) -> dict[str, np.ndarray]:
    return processor(text=texts, return_tensors="np")


def _by_tokenizer(processor: Any, folder: Path, texts: list[str]) -> dict[str, np.ndarray]:
    """Tokenize without transformers, as libraries of other languages do."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    padding = processor.tokenizer
    tokenizer.enable_padding(pad_id=padding.pad_token_id or 0, pad_token=padding.pad_token or "[PAD]")
    words = tokenizer.encode_batch(texts)
    return {
        "input_ids": np.array([encoding.ids for encoding in words]),
        "attention_mask": np.array([encoding.attention_mask for encoding in words]),
    }


def _onnx(tokenize: Any, suffix: str) -> Any:
    def encode(folder: Path, inputs: list[dict], images: list[Image.Image], expected: dict) -> Vectors:
        from onnxruntime import InferenceSession
        from transformers import AutoProcessor

        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
        text_tower, image_tower = (
            InferenceSession(str(folder / "onnx" / f"{name}{suffix}.onnx"), providers=["CPUExecutionProvider"])
            for name in ("text_model", "vision_model")
        )
        texts = expected["text"].copy()
        # Each long text alone, so that others are not padded to its length.
        short = [row for row, entry in enumerate(inputs) if "tokens" not in entry]
        for rows in (short, *([row] for row in range(len(inputs)) if row not in short)):
            words = tokenize(processor, folder, [inputs[row]["text"] for row in rows])
            if (length := words["input_ids"].shape[1]) > _MOST_TOKENS:
                if length != (limit := inputs[rows[0]].get("tokens")):
                    raise ValueError(f"a long text is truncated to {length} tokens, not to {limit}")
                continue
            (texts[rows],) = text_tower.run(None, {key: words[key] for key in ("input_ids", "attention_mask")})
        pixels = processor(images=images, return_tensors="np")
        (image_vectors,) = image_tower.run(None, {"pixel_values": pixels["pixel_values"]})
        return texts, image_vectors

    return encode


if __name__ == "__main__":
    main(Path(sys.argv[1]))
