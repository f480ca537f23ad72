"""Real images with names and no download: the symbols of the DejaVu faces that matplotlib carries.

Every printable symbol is drawn by Pillow in every face that has it. Its Unicode name in plain words is the short
caption; `symbol_texts` composes long captions, descriptions and confusable names from further Unicode properties.
"""

import hashlib
import io
import json
import os
import random
import shutil
import tempfile
import unicodedata
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from bifocal.data import symbol_texts
from bifocal.data.symbol_texts import confusable_names, describe, long_caption, plain_name
from bifocal.files import default_cache

# The upright sans face comes first: a symbol is judged by the image in the first face that has it.
FACES = (
    "DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique", "DejaVuSerif", "DejaVuSerif-Bold",
    "DejaVuSerif-Italic", "DejaVuSerif-BoldItalic", "DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSansMono-Oblique",
    "DejaVuSansMono-BoldOblique", "DejaVuSansDisplay", "DejaVuSerifDisplay",
)  # fmt: skip
NEGATIVES = 7


@dataclass(frozen=True)
class SymbolsConfig:
    """Settings that determine the data set.

    Args:
        image_size: side of the square images in pixels.
        test_symbols, validation_symbols: numbers of symbols that training never sees, in any face.
        wordings: numbers of long captions and of descriptions per symbol.
        limit: number of symbols, drawn at random; None means all.
        seed: seed of the split, the wordings and the limit.
    """

    image_size: int = 48
    test_symbols: int = 500
    validation_symbols: int = 500
    wordings: int = 4
    limit: int | None = None
    seed: int = 0


def font_files() -> dict[str, Path]:
    """Return the font files installed with matplotlib, by face.

    Raises:
        FileNotFoundError: if matplotlib's own fonts were removed, as some distributions do.
    """
    import matplotlib

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    files = {face: folder / f"{face}.ttf" for face in FACES if (folder / f"{face}.ttf").exists()}
    if FACES[0] not in files:
        raise FileNotFoundError(f"{folder} holds no {FACES[0]}.ttf; reinstall matplotlib from PyPI.")
    return files


def covered_symbols(path: Path) -> set[str]:
    """Return the printable symbols of a font: named, and neither control, format, unassigned nor space characters."""
    from matplotlib.ft2font import FT2Font

    symbols = {chr(code) for code in FT2Font(str(path)).get_charmap()}
    return {s for s in symbols if unicodedata.name(s, None) and unicodedata.category(s)[0] not in "CZ"}


def draw(symbol: str, path: Path, size: int) -> Image.Image | None:
    """Draw a symbol in black on white, `size` x `size` grey pixels; None if the face draws nothing.

    All symbols of a face share one scale and one baseline, so that a comma differs from an apostrophe; only what would
    not fit is drawn smaller.
    """
    em: float = round(size * 0.82)  # ascent and descent of the DejaVu faces are 1.16 em together
    for _ in range(2):
        font = ImageFont.truetype(str(path), em, layout_engine=ImageFont.Layout.BASIC)
        left, top, right, bottom = font.getbbox(symbol, anchor="ls")
        if right <= left or bottom <= top:
            return None
        excess = max((right - left) / size, (bottom - top) / size)
        if excess <= 1.0:
            break
        em = int(em / excess)
    baseline: float = round(size * 0.78)
    baseline += max(0, -(baseline + top)) - max(0, baseline + bottom - size)  # an accent on a capital still fits
    # By the advance, so that the left dots of a braille cell stay left. A combining mark has no advance, so by its ink.
    advance = font.getlength(symbol)
    x = (size - advance) / 2
    if not (advance and x + left >= 0 and x + right <= size):
        x = (size - left - right) / 2
    image = Image.new("L", (size, size), 255)
    ImageDraw.Draw(image).text((x, baseline), symbol, fill=0, font=font, anchor="ls")
    return image if np.asarray(image).min() < 128 else None


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def build_symbols(config: SymbolsConfig = SymbolsConfig(), cache: Path | None = None) -> Any:
    """Draw and caption every symbol, or load the result of an earlier call with the same settings.

    Args:
        cache: folder for finished data sets; None means the environment variable BIFOCAL_CACHE, or ~/.cache/bifocal.

    Returns:
        A `datasets.DatasetDict` with splits train, validation and test, split by symbol, one row each: `symbol`,
        `codepoint`, `name` (the short caption), `images` and `faces` (its images, the one for evaluation first),
        `long_captions`, `descriptions` (in other words) and `negatives` (the 7 most confusable names of its split).

    Raises:
        ValueError: if there are fewer symbols than the splits need.
    """
    from datasets import DatasetDict, load_from_disk

    fonts = font_files()
    folder = (cache or default_cache()) / f"symbols-{_fingerprint(config, fonts)}"
    if not folder.exists():
        rows = _rows(config, fonts)
        splits = DatasetDict({split: _as_dataset(part) for split, part in _split(rows, config).items()})
        # Written next to its folder and then moved, so that a killed run leaves nothing unfinished.
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=folder.name, dir=folder.parent))
        try:
            splits.save_to_disk(str(scratch / "data"))
            try:
                os.replace(scratch / "data", folder)
            except OSError:
                if not folder.exists():  # another process was not faster
                    raise
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return load_from_disk(str(folder))


def _fingerprint(config: SymbolsConfig, fonts: dict[str, Path]) -> str:
    """Return a digest of all that the data set is made from: settings, fonts, Unicode version, and the code."""
    digest = hashlib.sha256(json.dumps([asdict(config), unicodedata.unidata_version], sort_keys=True).encode())
    for path in [*fonts.values(), Path(__file__), Path(symbol_texts.__file__)]:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _rows(config: SymbolsConfig, fonts: dict[str, Path]) -> list[dict[str, Any]]:
    """Return the symbols with at least one image, drawn in every face, in the order of their code points."""
    from tqdm.auto import tqdm

    covered = {face: covered_symbols(path) for face, path in fonts.items()}
    symbols = sorted(set().union(*covered.values()))
    wanted = len(symbols)
    if config.limit is not None:
        random.Random(config.seed).shuffle(symbols)
        wanted = min(wanted, config.limit)
    rows: list[dict[str, Any]] = []
    with tqdm(total=wanted, desc="Drawing symbols", unit="symbol") as bar:
        for symbol in symbols:
            faces, images = [], []
            for face, path in fonts.items():
                image = draw(symbol, path, config.image_size) if symbol in covered[face] else None
                if image is not None:
                    faces.append(face)
                    images.append({"bytes": _png(image), "path": None})
            if images:  # some, such as the empty braille cell, have no ink
                rows.append({"symbol": symbol, "faces": faces, "images": images})
                bar.update()
            if len(rows) == wanted:
                break
    rows.sort(key=lambda row: row["symbol"])
    return rows


def _split(rows: list[dict[str, Any]], config: SymbolsConfig) -> dict[str, list[dict[str, Any]]]:
    """Split by symbol and add the texts; those of training name no symbol that is held out."""
    held_out = config.test_symbols + config.validation_symbols
    if len(rows) <= held_out + NEGATIVES:
        raise ValueError(
            f"There are {len(rows)} symbols, too few for {config.test_symbols} in test, {config.validation_symbols} in "
            "validation and some to train on; ask for fewer."
        )
    generator = random.Random(config.seed)
    generator.shuffle(rows)
    parts = {
        "test": rows[: config.test_symbols],
        "validation": rows[config.test_symbols : held_out],
        "train": rows[held_out:],
    }
    hidden = frozenset(row["symbol"] for row in rows[:held_out])
    for split, part in parts.items():
        names = [plain_name(row["symbol"]) for row in part]
        unspoken = hidden if split == "train" else frozenset()
        for row, name, negatives in zip(part, names, confusable_names(names, NEGATIVES), strict=True):
            symbol = row["symbol"]
            row["codepoint"], row["name"], row["negatives"] = ord(symbol), name, negatives
            row["long_captions"] = [long_caption(symbol, generator, unspoken) for _ in range(config.wordings)]
            row["descriptions"] = [describe(symbol, generator, unspoken) for _ in range(config.wordings)]
    return parts


def _as_dataset(rows: list[dict[str, Any]]) -> Any:
    from datasets import Dataset, Features, List, Value
    from datasets import Image as ImageFeature

    text = Value("string")
    features = Features(
        {
            "symbol": text,
            "codepoint": Value("int32"),
            "name": text,
            "images": List(ImageFeature()),
            "faces": List(text),
            "long_captions": List(text),
            "descriptions": List(text),
            "negatives": List(text),
        }
    )
    return Dataset.from_dict({column: [row[column] for row in rows] for column in features}, features=features)


def random_shift(image: Image.Image, generator: random.Random, pixels: int = 2) -> Image.Image:
    """Move an image by up to `pixels` in each direction; white comes in at the edge."""
    offset = generator.randint(-pixels, pixels), generator.randint(-pixels, pixels)
    shifted = Image.new(image.mode, image.size, "white")
    shifted.paste(image, offset)
    return shifted
