"""Compare models on your own images and captions: Bifocal, sentence-transformers, CLIP or SigLIP.

Run: python examples/evaluate_own_data.py runs/demo/model
Prints Recall@1 and Recall@5 of each model in both directions, and how many rows were skipped.

`bifocal evaluate` does the same from a suite, with more protocols and a page.
"""

import argparse

from bifocal import load_source
from bifocal.evaluation.encoders import load_encoder
from bifocal.evaluation.protocols import image_text_retrieval


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+", help="folders or Hub ids")
    parser.add_argument("--images", default="examples/data/images", help="a folder with metadata.jsonl")
    options = parser.parse_args(arguments)

    rows = load_source(options.images, "image-text")
    for path in options.models:
        result = image_text_retrieval(load_encoder(path), "mine", rows["image"], rows["caption"], ks=(1, 5))
        print(path, " ".join(f"{name} {value:.3f}" for name, value in result.metrics.items() if "recall@" in name))
        print(f"  {result.sizes}, {sum(result.skipped.values())} rows skipped")


if __name__ == "__main__":
    main()
