"""Search in languages that no image had a name in (the claim of arXiv 2412.08802 in small)."""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from datasets import Dataset
from datasets import Image as ImageFeature

from benchmarks.claims.conditions import Condition, Phase
from benchmarks.claims.datasets import ClaimData, shift
from benchmarks.claims.rules import Check, Outcomes, Verdict, at_least, values
from bifocal.evaluation.retrieval import recall_at, target_ranks
from bifocal.evaluation.rows import image_digest
from bifocal.files import RUN, replace_folder
from bifocal.modeling import BifocalConfig, BifocalModel, BifocalProcessor, load_image
from bifocal.modeling.processing_bifocal import image_processor_of_size
from bifocal.training.tasks import Task
from bifocal.training.tokenizer import train_unigram

FILES = ("emoji/train.parquet", "emoji/validation.parquet")
JOINT = "joint"
# Half of the 28 languages. Most of the other half (Spanish, Portuguese, Swedish, Czech, Ukrainian, Romanian, Persian,
# Bengali) have a relative here; Hebrew, Greek, Hungarian, Japanese, Vietnamese and Thai have none of their script or
# family.
TRAINED = ("en", "de", "fr", "it", "nl", "pl", "ru", "tr", "ar", "hi", "zh", "ko", "id", "fi")
TRAINED_R5, OTHER_R5, ENGLISH_R5 = "R@5, trained languages", "R@5, other languages", "R@5, English"
NAMES, AMONG, ACROSS = "names only", "and text pairs among the trained", "and text pairs of all languages"
_STEPS, _BATCH, _SIDE, _LENGTH = 500, 128, 32, 32
_TOWER = {"hidden_size": 128, "num_attention_heads": 4, "initializer_range": 0.05}
_TEXT = _TOWER | {"num_hidden_layers": 2, "intermediate_size": 256, "max_position_embeddings": _LENGTH,
                  "hidden_dropout_prob": 0.0}  # fmt: skip
_IMAGE = _TOWER | {"num_hidden_layers": 3, "intermediate_size": 341, "image_size": _SIDE, "patch_size": 8,
                   "patch_dropout": 0.0, "rope_reference_grid": 4}  # fmt: skip


@cache
def read_rows(path: Path) -> list[dict[str, Any]]:
    return pq.read_table(path).to_pylist()


def _rows(data: ClaimData, split: int) -> list[dict[str, Any]]:
    assert data.folder is not None
    return read_rows(data.folder / FILES[split])


def _processor(data: ClaimData) -> BifocalProcessor:
    """Return a processor whose tokenizer is trained on the names of the training images in all languages."""
    folder = data.out / "languages-processor"
    with data.lock:
        if not (folder / "processor_config.json").exists():
            names = sorted({name for row in _rows(data, 0) for name in row["names"].values() if name})
            processor = BifocalProcessor(image_processor_of_size(_SIDE), train_unigram(names, 8000, _LENGTH))
            with replace_folder(folder, RUN) as scratch:
                processor.save_pretrained(scratch)
    return BifocalProcessor.from_pretrained(folder)


def new_model(data: ClaimData) -> BifocalModel:
    processor = _processor(data)
    text = {**_TEXT, "vocab_size": -(-len(processor.tokenizer) // 64) * 64}
    model = BifocalModel(BifocalConfig(text_config=text, vision_config=_IMAGE, projection_dim=128))
    model.processor = processor
    return model


def images_with_names(data: ClaimData) -> Dataset:
    """Return the training images with their names in the trained languages; one is drawn at each use."""
    rows = _rows(data, 0)
    captions = [[row["names"][language] for language in TRAINED if row["names"][language]] for row in rows]
    found = Dataset.from_dict({"image": [row["image"] for row in rows], "caption": captions})
    return found.cast_column("image", ImageFeature(decode=False))


def name_pairs(data: ClaimData, languages: Any = None) -> Dataset:
    """Return pairs of the English name and the others of a training image, of which one is drawn at each use.

    Args:
        languages: languages of the other names; all if None.
    """
    rows = _rows(data, 0)
    chosen = [language for language in (languages or rows[0]["names"]) if language != "en"]
    others = [[row["names"][language] for language in chosen if row["names"][language]] for row in rows]
    return Dataset.from_dict({"query": [row["names"]["en"] for row in rows], "positive": others})


def language_conditions(data: ClaimData) -> list[Condition]:
    def condition(name: str, languages: Any = (), pairs: bool = True) -> Condition:
        def tasks(data: ClaimData) -> list[Task]:
            images = Task("images", "image-text", images_with_names(data), _BATCH)
            if not pairs:
                return [images]
            return [images, Task("names", "text-pair", name_pairs(data, languages), _BATCH)]

        phase = Phase(JOINT, tasks, _STEPS, 1.5e-3, _LENGTH, augment=shift)
        return Condition(name, [phase], measure, new_model=new_model)

    return [condition(NAMES, pairs=False), condition(AMONG, TRAINED), condition(ACROSS, None)]


def measure(model: BifocalModel, data: ClaimData) -> dict[str, float]:
    """Return Recall@5 of names as queries for new images, averaged over the languages of a group."""
    rows = _rows(data, 1)
    images = [load_image(row["image"]["bytes"]) for row in rows]
    digests = [image_digest(image) for image in images]
    vectors = model.encode_image(images, batch_size=128, show_progress=False)
    by_language = {}
    for language in rows[0]["names"]:
        named = [number for number, row in enumerate(rows) if row["names"][language]]
        texts = [rows[number]["names"][language] for number in named]
        ranks = target_ranks(
            model.encode_text(texts, batch_size=128, show_progress=False), vectors, np.array(named), texts, digests
        )
        by_language[language] = recall_at(ranks, 5)
    others = [language for language in by_language if language not in TRAINED]
    return {
        name: float(np.mean([by_language[language] for language in languages]))
        for name, languages in ((ENGLISH_R5, ["en"]), (TRAINED_R5, TRAINED), (OTHER_R5, others))
    }


def chance(data: ClaimData) -> float:
    return 5 / len(_rows(data, 1))


def judge_languages(outcomes: Outcomes, data: ClaimData) -> Verdict:
    names, across = (NAMES, JOINT), (ACROSS, JOINT)
    alone = float(values(outcomes, *names, OTHER_R5).mean()) - chance(data)
    return Verdict(
        [
            at_least(outcomes, OTHER_R5, across, names, 0.05, f"{OTHER_R5}: {ACROSS} against {NAMES}"),
            at_least(outcomes, TRAINED_R5, across, names, -0.03, f"{TRAINED_R5}: {ACROSS} against {NAMES}"),
            Check(f"{OTHER_R5}: {NAMES} against chance", alone, 0.02),
        ]
    )
