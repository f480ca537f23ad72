"""Run by `hub/check.py` in a process of its own: load a folder in every way and print how the vectors differ.

It imports nothing of Bifocal, since a user may have none.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors.numpy import load_file

# ONNX Runtime holds the scores of all heads at once, some 10 GB for 8,192 tokens at base size. Of texts that are longer
# than this it gets none; only where they are cut is compared.
_MOST_TOKENS = 2048
Vectors = tuple[np.ndarray, np.ndarray]


def main(folder: Path) -> None:
    listed = json.loads((folder / "examples" / "inputs.json").read_text(encoding="utf-8"))
    pictures = [Image.open(folder / entry["image"]).convert("RGB") for entry in listed if "image" in entry]
    kept = load_file(folder / "examples" / "vectors.safetensors")
    differences: dict[str, float] = {}
    failed: dict[str, str] = {}
    int8: float | None = None

    def compare(way: str, make: Any) -> Any:
        try:
            found = make()
        except Exception as error:  # whatever it is, it is what a user would meet
            failed[way] = (str(error).strip().splitlines() or [type(error).__name__])[0]
            return None
        if [vectors.shape for vectors in found] != [kept["text"].shape, kept["image"].shape]:
            failed[way] = f"its vectors have the shapes {[vectors.shape for vectors in found]}"
            return None
        return found

    ways = {"AutoModel": _auto_model, "SentenceTransformer": _sentence_transformer}
    if (folder / "onnx").exists():
        ways |= {
            "ONNX, float32": _onnx(_by_processor, ""),
            "ONNX, int8": _onnx(_by_processor, "_int8"),
            "ONNX by tokenizer.json": _onnx(_by_tokenizer, ""),
        }
    for way, encode in ways.items():
        found = compare(way, lambda encode=encode: encode(folder, listed, pictures, kept))
        if found is None:
            continue
        if way == "ONNX, int8":
            int8 = min(float((a * kept[k]).sum(1).min()) for a, k in zip(found, ("text", "image"), strict=True))
        else:
            differences[way] = max(float(np.abs(a - kept[k]).max()) for a, k in zip(found, ("text", "image")))
    print(json.dumps({"differences": differences, "failed": failed, "lowest_int8": int8}))


def _auto_model(folder: Path, listed: list[dict], pictures: list[Image.Image], kept: dict) -> Vectors:
    from transformers import AutoModel

    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    return model.encode_text([entry["text"] for entry in listed]), model.encode_image(pictures)


def _sentence_transformer(folder: Path, listed: list[dict], pictures: list[Image.Image], kept: dict) -> Vectors:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), trust_remote_code=True, device="cpu")
    return model.encode([entry["text"] for entry in listed]), model.encode(pictures)


def _by_processor(processor: Any, folder: Path, texts: list[str]) -> dict[str, np.ndarray]:
    return processor(text=texts, return_tensors="np")


def _by_tokenizer(processor: Any, folder: Path, texts: list[str]) -> dict[str, np.ndarray]:
    """Without transformers, as the libraries of other languages read the folder."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_padding()
    words = tokenizer.encode_batch(texts)
    return {
        "input_ids": np.array([one.ids for one in words]),
        "attention_mask": np.array([one.attention_mask for one in words]),
    }


def _onnx(tokenize: Any, suffix: str) -> Any:
    def encode(folder: Path, listed: list[dict], pictures: list[Image.Image], kept: dict) -> Vectors:
        from onnxruntime import InferenceSession
        from transformers import AutoProcessor

        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
        text_tower, image_tower = (
            InferenceSession(str(folder / "onnx" / f"{name}{suffix}.onnx"), providers=["CPUExecutionProvider"])
            for name in ("text_model", "vision_model")
        )
        texts = kept["text"].copy()
        # Long texts each on its own, so that others are not padded to their length.
        short = [row for row, entry in enumerate(listed) if "tokens" not in entry]
        for rows in (short, *([row] for row in range(len(listed)) if row not in short)):
            words = tokenize(processor, folder, [listed[row]["text"] for row in rows])
            if (length := words["input_ids"].shape[1]) > _MOST_TOKENS:
                if length != (wanted := listed[rows[0]].get("tokens")):
                    raise ValueError(f"a long text is cut at {length} tokens and not at {wanted}")
                continue
            (texts[rows],) = text_tower.run(None, {key: words[key] for key in ("input_ids", "attention_mask")})
        pixels = processor(images=pictures, return_tensors="np")
        (images,) = image_tower.run(None, {"pixel_values": pixels["pixel_values"]})
        return texts, images

    return encode


if __name__ == "__main__":
    main(Path(sys.argv[1]))
