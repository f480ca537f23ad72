"""Embed texts and images, and find the best image for each text.

Run: python examples/encode.py
Prints, for each text, the image with the highest cosine.
"""

import argparse
from pathlib import Path

from transformers import AutoModel

TEXTS = ["black star", "greek small letter omega", "umbrella", "black chess knight"]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="runs/demo/model", help="a Bifocal folder or Hub id")
    parser.add_argument("--images", type=Path, default=Path("examples/data/images"), help="a folder of images")
    options = parser.parse_args(arguments)

    model = AutoModel.from_pretrained(options.model, trust_remote_code=True)
    paths = sorted(options.images.glob("*.png"))
    cosines = model.encode_text(TEXTS) @ model.encode_image(paths).T

    for text, row in zip(TEXTS, cosines, strict=True):
        best = row.argmax()
        print(f"{text}: {paths[best].name} ({row[best]:.3f})")


if __name__ == "__main__":
    main()
