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


def main(folder: Path) -> None:
    listed = json.loads((folder / "examples" / "inputs.json").read_text(encoding="utf-8"))
    texts = [entry["text"] for entry in listed]
    pictures = [Image.open(folder / entry["image"]).convert("RGB") for entry in listed]
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
        ways |= {"ONNX, float32": _onnx(""), "ONNX, int8": _onnx("_int8")}
    for way, encode in ways.items():
        found = compare(way, lambda encode=encode: encode(folder, texts, pictures))
        if found is None:
            continue
        if way == "ONNX, int8":
            int8 = min(float((a * kept[k]).sum(1).min()) for a, k in zip(found, ("text", "image"), strict=True))
        else:
            differences[way] = max(float(np.abs(a - kept[k]).max()) for a, k in zip(found, ("text", "image")))
    print(json.dumps({"differences": differences, "failed": failed, "lowest_int8": int8}))


def _auto_model(folder: Path, texts: list[str], pictures: list[Image.Image]) -> tuple[np.ndarray, np.ndarray]:
    from transformers import AutoModel

    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    return model.encode_text(texts), model.encode_image(pictures)


def _sentence_transformer(folder: Path, texts: list[str], pictures: list[Image.Image]) -> tuple[np.ndarray, np.ndarray]:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), trust_remote_code=True, device="cpu")
    return model.encode(texts), model.encode(pictures)


def _onnx(suffix: str) -> Any:
    def encode(folder: Path, texts: list[str], pictures: list[Image.Image]) -> tuple[np.ndarray, np.ndarray]:
        import onnxruntime
        from transformers import AutoProcessor

        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
        words = processor(text=texts, padding=True, return_tensors="np")
        pixels = processor(images=pictures, return_tensors="np")["pixel_values"]
        found = []
        for name, inputs in (
            ("text_model", {key: words[key] for key in ("input_ids", "attention_mask")}),
            ("vision_model", {"pixel_values": pixels}),
        ):
            session = onnxruntime.InferenceSession(
                str(folder / "onnx" / f"{name}{suffix}.onnx"), providers=["CPUExecutionProvider"]
            )
            found.append(session.run(None, inputs)[0])
        return found[0], found[1]

    return encode


if __name__ == "__main__":
    main(Path(sys.argv[1]))
