"""The claims' data from the Hub, written in the layout of `--data`."""

import csv
import json
from pathlib import Path
from typing import Any

import yaml
from datasets import Image, load_dataset

from bifocal.files import replace_folder

RECIPE = Path(__file__).with_name("sources.yaml")


def fetch(folder: Path, recipe: Path = RECIPE) -> Path:
    """Return the folder with the data. It is loaded from the Hub if the folder does not exist.

    Args:
        folder: folder of the data.
        recipe: ids, columns and splits on the Hub.

    Raises:
        Exception: if the Hub cannot be reached or has no such data (as `datasets` raises it).
    """
    if folder.exists():
        return folder
    sources = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    with replace_folder(folder, "copy of the claims' data") as scratch:
        for part in ("cifar10", "captions", "stsb"):
            (scratch / part).mkdir(parents=True)
        _photos(sources["photos"], scratch / "cifar10")
        _captions(sources["captions"], scratch / "captions")
        _sts(sources["sts"], scratch / "stsb" / "stsb-dev.csv")
    return folder


def _photos(source: dict[str, Any], folder: Path) -> None:
    """Write Parquet files with `image` (bytes) and `label` (a word)."""
    image, label = (source["columns"][name] for name in ("image", "label"))
    for ours, theirs in source["splits"].items():
        rows = load_dataset(source["path"], split=theirs)
        rows = rows.shuffle(seed=0).take(min(source["limit"][ours], len(rows)))
        words = getattr(rows.features[label], "int2str", str)
        rows = rows.cast_column(image, Image(decode=False))
        written = rows.map(
            lambda row, words=words: {"image": row[image]["bytes"], "label": words(row[label])},
            remove_columns=rows.column_names,
        )
        written.to_parquet(str(folder / f"{ours}.parquet"))


def _captions(source: dict[str, Any], folder: Path) -> None:
    """Write a JSON line per photo. The last photos are the validation split."""
    rows = [row[source["column"]] for row in load_dataset(source["path"], split="train")]
    rows = [texts for texts in rows if isinstance(texts, list) and len(texts) > 1]
    held_out = source["validation"]
    for name, part in (("train", rows[:-held_out]), ("val", rows[-held_out:])):
        lines = [json.dumps({"photo": f"{name}-{n}", "captions": texts}) for n, texts in enumerate(part)]
        (folder / f"flickr30k-{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _sts(source: dict[str, Any], path: Path) -> None:
    """Write a CSV file with two texts and a score per row."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        for row in load_dataset(source["path"], split=source["split"]):
            writer.writerow([row["sentence1"], row["sentence2"], row["score"]])
