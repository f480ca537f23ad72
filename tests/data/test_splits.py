"""The splits of a source hold its rows, with the same names and in the same order."""

import csv
import json
import pickle
from pathlib import Path

import pyarrow as pa
import pytest
from datasets import Dataset
from PIL import Image
from pyarrow.parquet import write_table

from bifocal.data.loading import iter_rows, load_source
from bifocal.data.row_names import row_name
from bifocal.data.skips import RowError
from bifocal.data.source import Source
from bifocal.data.splits import split_source
from bifocal.errors import DataError
from bifocal.modeling import load_image
from tests.data.files import image_bytes, lines, shard, shards


def table(first: int, count: int) -> list[dict]:
    return [{"query": f"query {n}", "positive": f"positive {n}"} for n in range(first, first + count)]


def delimited(path: Path, rows: list[dict], delimiter: str) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)


def tars(folder: Path) -> dict:
    return dict(path=shards(folder, [3, 2, 4]))


def folder_of_tars(folder: Path) -> dict:
    shards(folder, [3, 2])
    return dict(path=str(folder))


def json_lines(folder: Path) -> dict:
    paths = [lines(folder / f"{name}.jsonl", table(n, 3)) for n, name in enumerate(("b", "a", "c.gz"))]
    paths[2] = lines(folder / "c.jsonl.gz", [*table(50, 2), {"query": "no positive"}])
    return dict(path=[str(path) for path in paths])


def json_arrays(folder: Path) -> dict:
    for name in ("a", "b"):
        (folder / f"{name}.json").write_text(json.dumps(table(ord(name), 3)))
    return dict(path=f"{folder}/*.json")


def csv_files(folder: Path) -> dict:
    for name in ("a", "b"):
        rows = [{"title": row["query"], "body": row["positive"]} for row in table(ord(name), 3)]
        delimited(folder / f"{name}.csv", rows, ";")
    return dict(path=f"{folder}/*.csv", delimiter=";", column_mapping={"title": "query", "body": "positive"})


def tsv_files(folder: Path) -> dict:
    for name in ("a", "b"):
        delimited(folder / f"{name}.tsv", table(ord(name), 3), "\t")
    return dict(path=f"{folder}/{{a,b}}.tsv")


def csv_without_headers(folder: Path) -> dict:
    for name in ("a", "b"):
        (folder / f"{name}.csv").write_text(f"one {name},two {name}\nthree {name},four {name}\n")
    return dict(path=f"{folder}/*.csv", column_names=["query", "positive"])


def folder_of_csv(folder: Path) -> dict:
    (folder / "tables").mkdir()
    for name in ("a", "b"):
        delimited(folder / "tables" / f"{name}.csv", table(ord(name), 3), ",")
    return dict(path=str(folder / "tables"))


def msmarco(folder: Path) -> dict:
    for name in ("a", "b"):
        (folder / f"{name}.tsv").write_text(f"q {name}\tp {name}\tn {name}\n" * 2)
    return dict(path=f"{folder}/*.tsv", format="msmarco")


def parquet(folder: Path) -> dict:
    for name in ("a", "b"):
        write_table(pa.Table.from_pylist(table(ord(name), 300)), folder / f"{name}.parquet")
    return dict(path=f"{folder}/*.parquet")


def arrow(folder: Path) -> dict:
    Dataset.from_list(table(0, 10)).save_to_disk(folder / "saved", num_shards=3)
    return dict(path=str(folder / "saved"))


def nli(folder: Path) -> dict:
    for name in ("a", "b"):
        labels = ("entailment", "contradiction", "neutral")
        rows = [{"sentence1": "a man", "sentence2": f"{label} {name}", "gold_label": label} for label in labels]
        lines(folder / f"{name}.jsonl", rows)
    return dict(path=f"{folder}/*.jsonl")


def dpr(folder: Path) -> dict:
    """The rows of the first file show the layout; those of the second would be taken for plain ones."""
    whole = {"question": "q", "positive_ctxs": [{"title": "", "text": "p"}], "negative_ctxs": []}
    (folder / "a.json").write_text(json.dumps([{**whole, "hard_negative_ctxs": []}]))
    (folder / "b.json").write_text(json.dumps([{"query": "q", "positive": "p"}]))
    return dict(path=f"{folder}/*.json")


def same_names(folder: Path) -> dict:
    """Rows are named by the whole path of their file."""
    for name in ("one", "two"):
        (folder / name).mkdir()
        lines(folder / name / "pairs.jsonl", table(ord(name[0]), 2))
    return dict(path=[f"{folder}/one/pairs.jsonl", f"{folder}/two/pairs.jsonl"])


def missing_file(folder: Path) -> dict:
    for name in ("0", "2"):
        lines(folder / f"{name}.jsonl", table(int(name), 2))
    return dict(path=f"{folder}/{{0..2}}.jsonl")


def empty_file(folder: Path) -> dict:
    lines(folder / "0.jsonl", table(0, 2))
    (folder / "1.jsonl").write_text("")
    lines(folder / "2.jsonl", [{"query": "only"}])  # alone it would have no column `positive`
    return dict(path=f"{folder}/*.jsonl")


def filtered(folder: Path) -> dict:
    return {**json_lines(folder), "clean": {"exclude": ["query 1"]}}


def image_paths(folder: Path) -> dict:
    """Paths of images start from the folder of the file that names them."""
    for name in ("one", "two"):
        (folder / name).mkdir()
        (folder / name / "image.png").write_bytes(image_bytes(form="PNG", seed=len(name)))
        lines(folder / name / f"{name}.jsonl", [{"image": "image.png", "caption": name}])
    return dict(path=[f"{folder}/one/one.jsonl", f"{folder}/two/two.jsonl"], kind="image-text")


KINDS = {"tars": "image-text", "folder_of_tars": "image-text", "msmarco": "text-triplet", "image_paths": "image-text"}
MADE = [
    tars, folder_of_tars, json_lines, json_arrays, csv_files, tsv_files, csv_without_headers, folder_of_csv, msmarco,
    parquet, arrow, nli, dpr, same_names, missing_file, empty_file, filtered, image_paths,
]  # fmt: skip


def named(source: Source, kind: str) -> list[tuple[str, object]]:
    return [(name, str(row) if isinstance(row, RowError) else row) for name, row in iter_rows(source, kind)]


@pytest.mark.parametrize("make", MADE, ids=[make.__name__ for make in MADE])
def test_splits_hold_the_rows_of_the_source(make, tmp_path):
    options = make(tmp_path)
    kind = options.pop("kind", None) or KINDS.get(make.__name__, "text-pair")
    source = Source(**options)
    whole = named(source, kind)
    splits = split_source(source, kind)
    assert len(splits) in (2, 3)
    assert whole
    assert not all(isinstance(row, str) for _, row in whole)
    for other in (splits, pickle.loads(pickle.dumps(splits)), [split.model_copy() for split in splits]):
        assert [row for split in other for row in named(split, kind)] == whole


def test_what_is_read_as_a_whole_is_one_split(tmp_path):
    pairs = json_lines(tmp_path)
    for options in (
        dict(path=pairs["path"][0]),
        dict(**pairs, limit=2),
        dict(**pairs, clean={"deduplicate_texts": True}),
        dict(path="symbols"),
        dict(path="someone/pairs", format="hub"),
    ):
        source = Source(**options)
        assert split_source(source, "text-pair") == [source]


def test_folders_that_are_read_as_a_whole_are_one_split(tmp_path):
    (tmp_path / "a.png").write_bytes(image_bytes(form="PNG"))
    lines(tmp_path / "metadata.jsonl", [{"file_name": "a.png", "caption": "one"}])
    source = Source(path=str(tmp_path))
    assert split_source(source, "image-text") == [source]
    assert split_source(source, "image-only") == [source]


def test_the_splits_of_a_corpus_are_files(tmp_path, monkeypatch):
    for number in (0, 1):
        shard(tmp_path / f"{number}.tar", number, 1)
    whole = Source(path=f"{tmp_path}/*.tar")
    monkeypatch.setattr("bifocal.data.splits.named_source", lambda source: whole)
    assert [split.title for split in split_source(Source(path="corpus:tars"), "image-text")] == [
        str(tmp_path / f"{number}.tar") for number in (0, 1)
    ]


def test_a_source_that_does_not_exist(tmp_path):
    with pytest.raises(DataError, match="There is nothing at"):
        split_source(Source(path=f"{tmp_path}/*.jsonl"), "text-pair")


def test_the_cache_tells_a_split_from_the_file_alone(tmp_path):
    """Of files with the same name, rows have the whole path; a file that is read alone needs only its name."""
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        lines(tmp_path / folder / "rows.jsonl", table(0, 2))
    second = split_source(Source(path=f"{tmp_path}/*/rows.jsonl"), "text-pair")[1]
    alone = Source(path=str(tmp_path / "two" / "rows.jsonl"))
    assert row_name(load_source(alone, "text-pair"), 0) == "rows.jsonl:1"
    assert row_name(load_source(second, "text-pair"), 0) == f"{tmp_path}/two/rows.jsonl:1"


def test_images_are_those_next_to_the_file_that_names_them(tmp_path):
    """Tables in two folders, each with an image of the same name: as a whole, as splits, and loaded."""
    for folder, colour in (("a", "red"), ("b", "blue")):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (9, 9), colour).save(tmp_path / folder / "1.png")
        lines(tmp_path / folder / f"{folder}.jsonl", [{"image": "1.png", "caption": colour}])
    source = Source(path=f"{tmp_path}/*/*.jsonl")
    rows = [row for _, row in iter_rows(source, "image-text")]
    assert [(row["image"], row["caption"]) for row in rows] == [
        (str(tmp_path / "a" / "1.png"), "red"), (str(tmp_path / "b" / "1.png"), "blue"),
    ]  # fmt: skip
    of_splits = [row for split in split_source(source, "image-text") for _, row in iter_rows(split, "image-text")]
    assert of_splits == rows
    assert [load_image(row["image"]).getpixel((0, 0)) for row in load_source(source, "image-text")] == [
        (255, 0, 0), (0, 0, 255),
    ]  # fmt: skip
    stream = load_source(source.model_copy(update={"streaming": True}), "image-text")
    assert [row["image"] for row in stream.as_iterable()] == [row["image"] for row in rows]
    rooted = source.model_copy(update={"image_root": str(tmp_path / "a")})
    assert [row["image"] for _, row in iter_rows(rooted, "image-text")] == [str(tmp_path / "a" / "1.png")] * 2
