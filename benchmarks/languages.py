"""Search in languages that no image had a caption in: does a text task from English to other languages carry over?

Run: python benchmarks/languages.py --data FOLDER [--steps 600] [--seeds 0 1 2] [--out runs/languages]

FOLDER holds train.parquet and validation.parquet with the columns `image` and `names`, a struct of names by language
(here 1,262 and 236 emoji of Noto Color Emoji with their names in Unicode's CLDR, in 28 languages).

Prints one JSON line per condition and seed with the recall at 5 of names as queries for images, in percent, averaged
over the languages of three groups: English, those of `TRAINED`, all others. `train` searches the images of training,
`validation` those that were never seen. Small models are trained from nothing; all conditions have the same tokenizer,
steps and image batches:

- english: image-text in English only.
- some: and text pairs from English to the languages of `TRAINED`.
- all: and text pairs from English to all languages.
- captions: image-text in all languages, no text pairs.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from bifocal.modeling import BifocalModel, BifocalProcessor
from bifocal.modeling.processing_bifocal import image_processor_of_size
from bifocal.training.recipe import Recipe
from bifocal.training.runner import run_recipe
from bifocal.training.tokenizer import train_unigram

# Of each family and script, some; the other languages are Portuguese, Dutch, Swedish, Ukrainian and Romanian, which
# have relatives here, and Japanese, Thai, Hebrew, Hungarian and Bengali, which have not.
TRAINED = [
    "de", "fr", "es", "it", "pl", "cs", "ru", "tr", "ar", "fa", "hi", "zh", "ko", "vi", "id", "el", "fi",
]  # fmt: skip
CONDITIONS = ("english", "some", "all", "captions")
SIDE, LENGTH = 32, 32
_TOWER = {"hidden_size": 128, "num_attention_heads": 4, "initializer_range": 0.05}
MODEL = {
    "projection_dim": 128,
    "text_config": _TOWER | {"num_hidden_layers": 2, "intermediate_size": 256, "max_position_embeddings": LENGTH,
                             "hidden_dropout_prob": 0.0},
    "vision_config": _TOWER | {"num_hidden_layers": 3, "intermediate_size": 341, "image_size": SIDE, "patch_size": 8,
                               "patch_dropout": 0.0, "rope_reference_grid": 4},
}  # fmt: skip


def tasks(condition: str, data: str) -> list[dict[str, Any]]:
    """Return the tasks of a condition's recipe."""

    def source(**columns: str) -> dict[str, Any]:
        mapping = {key.replace("_", "."): column for key, column in columns.items()}
        return {"path": data, "column_mapping": mapping}

    captions = source(names="caption") if condition == "captions" else source(names_en="caption")
    found: list[dict[str, Any]] = [{"name": "images", "kind": "image-text", "data": captions, "batch_size": 128}]
    if condition == "all":
        pairs = {"all": source(names_en="query", names="positive")}
    else:
        languages = TRAINED if condition == "some" else []
        pairs = {language: source(names_en="query", **{f"names_{language}": "positive"}) for language in languages}
    return found + [
        {"name": name, "kind": "text-pair", "data": pair, "batch_size": 128} for name, pair in pairs.items()
    ]


def recall(model: BifocalModel, rows: list[dict[str, Any]]) -> dict[str, float]:
    """Return the recall at 5 of each language's names in percent; an equally similar image counts as ranked before."""
    images = model.encode_image([row["image"]["bytes"] for row in rows], show_progress=False)
    result = {}
    for language in rows[0]["names"]:
        named = [number for number, row in enumerate(rows) if row["names"][language]]
        texts = model.encode_text([rows[number]["names"][language] for number in named], show_progress=False)
        scores = texts @ images.T
        before = (scores >= scores[np.arange(len(named)), named][:, None]).sum(axis=1) - 1
        result[language] = 100 * float((before < 5).mean())
    return result


def groups(by_language: dict[str, float]) -> dict[str, float]:
    """Return the means over the groups of languages."""
    others = [language for language in by_language if language != "en" and language not in TRAINED]
    return {
        name: round(float(np.mean([by_language[language] for language in languages])), 1)
        for name, languages in (("en", ["en"]), ("trained", TRAINED), ("others", others))
    }


def processor_for(rows: list[dict[str, Any]], folder: Path) -> Path:
    """Save a processor whose tokenizer is trained on the names in all languages, and return its folder."""
    names = sorted({name for row in rows for name in row["names"].values() if name})
    BifocalProcessor(image_processor_of_size(SIDE), train_unigram(names, 8000, LENGTH)).save_pretrained(folder)
    return folder


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--conditions", nargs="+", default=CONDITIONS, choices=CONDITIONS)
    parser.add_argument("--out", type=Path, default=Path("runs/languages"))
    options = parser.parse_args(arguments)
    rows = {name: pq.read_table(options.data / f"{name}.parquet").to_pylist() for name in ("train", "validation")}
    options.out.mkdir(parents=True, exist_ok=True)
    processor = processor_for(rows["train"], options.out / "processor")
    for seed in options.seeds:
        for condition in options.conditions:
            recipe = Recipe(
                name=condition, output_dir=str(options.out / f"{condition}-{seed}"), seed=seed, device="cpu",
                augment="shift", processor=str(processor), image_size=SIDE, max_length=LENGTH, model=MODEL,
                tasks=tasks(condition, str(options.data / "train.parquet")),
                training={
                    "max_steps": options.steps, "learning_rate": 1.5e-3, "lr_scheduler_type": "cosine",
                    "warmup_steps": options.steps // 10, "weight_decay": 0.05, "adam_beta2": 0.98, "max_grad_norm": 1.0,
                    "dataloader_pin_memory": False, "save_strategy": "no", "disable_tqdm": True,
                },
            )  # fmt: skip
            run_recipe(recipe, _save)
            model = BifocalModel.from_pretrained(recipe.folder / "model")
            result = {name: groups(recall(model, part)) for name, part in rows.items()}
            print(json.dumps({"condition": condition, "seed": seed, "steps": options.steps, **result}), flush=True)


def _save(model: Any, processor: BifocalProcessor, folder: Path) -> None:
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


if __name__ == "__main__":
    main()
