"""How many altered copies of images and texts are found as near-duplicates, and how many pairs of different ones.

Run: python benchmarks/near_duplicates.py --images photos.parquet emoji.parquet --texts captions.jsonl
     python benchmarks/near_duplicates.py --random 1000000

Prints JSON lines. Of each Parquet file with a column `image` (bytes), the first 1,000 images are altered: for each
limit in bits, the share of copies that `similar_images` pairs with their original, and the pairs among the first 2,500
different images. Of the JSONL file, the first caption of each row (`captions`) or its `text` is edited, likewise. Pairs
of different images or texts were not labelled: some may be true duplicates.
"""

import argparse
import io
import json
import random
import resource
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from PIL import Image, ImageEnhance

from bifocal.data.filters import comparable_text
from bifocal.data.near_duplicates import (
    near_duplicate_images,
    near_duplicate_texts,
    similar_images,
    similar_texts,
)
from bifocal.data.signatures import Signatures, sign_image, sign_texts

ALTERED, DIFFERENT, DIFFERENT_TEXTS = 1000, 2500, 4000


def saved(image: Image.Image, quality: int = 95) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def resized(image: Image.Image, factor: float) -> Image.Image:
    return image.resize((round(image.width * factor), round(image.height * factor)), Image.Resampling.BICUBIC)


def cropped(image: Image.Image) -> Image.Image:
    """Return an image without 2 % of its width and height, one pixel at least, at the left and the top."""
    return image.crop(
        (max(1, round(image.width * 0.02)), max(1, round(image.height * 0.02)), image.width, image.height)
    )


IMAGE_CHANGES: dict[str, Callable[[Image.Image], bytes]] = {
    "JPEG at quality 50": lambda image: saved(image, 50),
    "half size": lambda image: saved(resized(image, 0.5)),
    "brightness x 1.15": lambda image: saved(ImageEnhance.Brightness(image).enhance(1.15)),
    "2/3 size, brightness x 0.9, JPEG at quality 70": lambda image: saved(
        ImageEnhance.Brightness(resized(image, 2 / 3)).enhance(0.9), 70
    ),
    "2 % of the left and upper edge cut off": lambda image: saved(cropped(image)),
}


def without_punctuation(text: str, draw: random.Random) -> str:
    return "".join(letter for letter in text if letter.isalnum() or letter.isspace())


def swapped(text: str, draw: random.Random) -> str:
    start = draw.randrange(len(text) - 1)
    return text[:start] + text[start + 1] + text[start] + text[start + 2 :]


def word_removed(text: str, draw: random.Random) -> str:
    words = text.split()
    del words[draw.randrange(len(words))]
    return " ".join(words)


def word_replaced(text: str, draw: random.Random) -> str:
    words = text.split()
    words[draw.randrange(len(words))] = "something"
    return " ".join(words)


TEXT_CHANGES = {
    "punctuation removed": without_punctuation, "two letters swapped": swapped, "a word removed": word_removed,
    "a word replaced": word_replaced,
}  # fmt: skip


def of_images(images: list[bytes]) -> Signatures:
    return Signatures.of_images([str(number) for number in range(len(images))], [sign_image(image) for image in images])


def of_texts(texts: list[str]) -> Signatures:
    names = [str(number) for number in range(len(texts))]
    return Signatures(names, texts={"text": sign_texts([comparable_text(text) for text in texts])})


def found(pairs: list[list[int]]) -> int:
    """Return how many copies are paired with their original, which has the same number."""
    return sum(copy == original for copy, original in pairs)


def measure_images(file: Path) -> None:
    originals = [row["bytes"] if isinstance(row, dict) else row for row in pq.read_table(file)["image"].to_pylist()]
    originals = originals[:DIFFERENT]
    different = of_images(originals)
    first = of_images(originals[:ALTERED])
    copies = {}
    for change, alter in IMAGE_CHANGES.items():
        decoded = (Image.open(io.BytesIO(image)).convert("RGB") for image in originals[:ALTERED])
        copies[change] = of_images([alter(image) for image in decoded])
    for bits in (4, 6, 8):
        shares = {}
        for change, altered in copies.items():
            # One by one: of equal originals, only the first is paired.
            shares[change] = sum(
                len(similar_images(row_of(altered, number), bits, row_of(first, number)))
                for number in range(len(first.names))
            ) / len(first.names)
        pairs = len(similar_images(different, bits))
        print(json.dumps({"file": file.name, "bits": bits, "found": shares, "images": len(originals), "pairs": pairs}))


def row_of(signatures: Signatures, number: int) -> Signatures:
    assert signatures.hashes is not None
    assert signatures.colours is not None
    assert signatures.plain is not None
    rows = slice(number, number + 1)
    return Signatures(signatures.names[rows], signatures.hashes[rows], signatures.colours[rows], signatures.plain[rows])


def measure_texts(file: Path) -> None:
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    texts = [row["captions"][0] if "captions" in row else row["text"] for row in rows][:DIFFERENT_TEXTS]
    different, first = of_texts(texts), of_texts(texts[:ALTERED])
    draw = random.Random(0)
    copies = {change: of_texts([edit(text, draw) for text in texts[:ALTERED]]) for change, edit in TEXT_CHANGES.items()}
    for least in (0.7, 0.8, 0.9):
        shares = {
            change: found(similar_texts(altered, least, first).tolist()) / len(first.names)
            for change, altered in copies.items()
        }
        pairs = len(similar_texts(different, least))
        length = sum(map(len, texts)) / len(texts)
        print(
            json.dumps(
                {"file": file.name, "at least": least, "found": shares, "texts": len(texts), "characters": length,
                 "pairs": pairs}
            )
        )  # fmt: skip


def measure_random(rows: int) -> None:
    """Print how long all rows take whose signatures are random, a tenth of them copies, and how much memory."""
    draws = np.random.default_rng(0)
    originals = np.arange(rows)
    originals[1::10] -= 1
    hashes = draws.integers(0, 256, (rows, 8), dtype=np.uint8)[originals]
    images = Signatures([], hashes, np.tile(hashes, (1, 24)), np.zeros(rows, bool))
    seconds, memory = measured(lambda: near_duplicate_images(images, 8))
    figures = {"rows": rows, "seconds of images": seconds, "bytes of an image": 201 + memory / rows}
    values = draws.integers(0, 2**32, (rows, 128), dtype=np.uint32)[originals]
    texts = Signatures([], texts={"text": values})
    seconds, memory = measured(lambda: near_duplicate_texts(texts, 0.8))
    print(json.dumps({**figures, "seconds of texts": seconds, "bytes of a text": 512 + memory / rows}))


def measured(skip: Callable[[], dict[int, int]]) -> tuple[float, float]:
    """Return the seconds of a call, and by how many bytes the largest memory of this process grew."""
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    assert skip()
    return time.monotonic() - started, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, nargs="*", default=[], help="Parquet files with a column `image`.")
    parser.add_argument("--texts", type=Path, help="JSONL file with `captions` or `text`.")
    parser.add_argument("--random", type=int, help="Number of random signatures of which copies are found.")
    options = parser.parse_args()
    for file in options.images:
        measure_images(file)
    if options.texts is not None:
        measure_texts(options.texts)
    if options.random is not None:
        measure_random(options.random)


if __name__ == "__main__":
    main()
