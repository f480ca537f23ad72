"""Rows of training data that are in an evaluation set are found, named and removed."""

import json

import pytest

from tests.bifocal.commands import error_of, invoke
from tests.data.files import image_bytes, lines
from tests.data.test_near_duplicates import SENTENCES, altered


@pytest.fixture
def pairs(tmp_path):
    """Pairs of which the second is in the evaluation set, and of the third the positive, with a comma."""
    lines(
        tmp_path / "train.jsonl",
        [{"query": f"question {'xyz'[n]} of mine", "positive": SENTENCES[n]} for n in range(3)],
    )
    other = SENTENCES[2].replace("dress", "dress,")
    lines(tmp_path / "eval.jsonl", [{"text": SENTENCES[5]}, {"text": f"  {SENTENCES[1].upper()} "}, {"text": other}])
    return tmp_path


@pytest.fixture
def images(tmp_path):
    """Three images; the evaluation set has the first re-encoded and the bytes of the third, and a common caption."""
    for part, numbers in (("train", range(3)), ("eval", (7, 0, 2))):
        (tmp_path / part).mkdir()
        for n in numbers:
            content = image_bytes((160, 120), seed=n)
            content = altered(content)["half"] if part == "eval" and n == 0 else content
            (tmp_path / part / f"{n}.jpg").write_bytes(content)
        rows = [{"file_name": f"{n}.jpg", "caption": "a dog" if n in (1, 7) else f"{part} {n}"} for n in numbers]
        lines(tmp_path / part / "metadata.jsonl", rows)
    return tmp_path


def leaks(folder):
    return [json.loads(line) for line in (folder / "runs/leakage.jsonl").read_text().splitlines()]


def test_texts(pairs):
    done = invoke(pairs, "data", "leakage", "train.jsonl", "eval.jsonl")
    assert done.stdout.splitlines() == [
        "2 of 3 rows (66.67%) are in eval.jsonl, by their text.",
        "texts: 1 equal, 1 near-duplicates, in 2 rows",
        "All leaks are named in runs/leakage.jsonl.",
    ]
    assert [(leak["train"], leak["evaluation"], leak["exact"]) for leak in leaks(pairs)] == [
        ("train.jsonl:2", "eval.jsonl:2", True),
        ("train.jsonl:3", "eval.jsonl:3", False),
    ]
    assert leaks(pairs)[0]["train_text"] == SENTENCES[1]


def test_the_image_decides(images):
    done = invoke(images, "data", "leakage", "train", "eval")
    first, by_image, by_text, _ = done.stdout.splitlines()
    assert first == "2 of 3 rows (66.67%) are in eval, by their image."
    assert by_image == "images: 1 equal, 1 near-duplicates, in 2 rows"
    assert by_text.startswith("texts: 1 equal, 0 near-duplicates, in 1 rows; short captions match by chance")
    named = [(leak["match"], leak["train"], leak["evaluation"], leak["exact"]) for leak in leaks(images)]
    assert named == [
        ("image", "metadata.jsonl:1", "metadata.jsonl:2", False),
        ("image", "metadata.jsonl:3", "metadata.jsonl:3", True),
        ("text", "metadata.jsonl:2", "metadata.jsonl:1", True),
    ]


def test_clean_removes_them(images, pairs):
    done = invoke(images, "data", "clean", "train", "out", "clean.exclude_rows_of=eval")
    assert done.stdout.startswith("1 rows are in out; skipped: 2 image of an excluded source")
    log = [json.loads(line) for line in (images / "out/skipped.jsonl").read_text().splitlines()]
    assert [(entry["row"], entry["detail"]) for entry in log] == [
        ("metadata.jsonl:1", "image of metadata.jsonl:2 in eval"),
        ("metadata.jsonl:3", "image of metadata.jsonl:3 in eval"),
    ]
    setting = "clean.exclude_rows_of=[{path: eval.csv, column_mapping: {body: text}}]"
    (pairs / "eval.csv").write_text(f"body\n{SENTENCES[0]}\n")
    invoke(pairs, "data", "clean", "train.jsonl", "texts", setting)
    assert json.loads((pairs / "texts/skipped.jsonl").read_text())["row"] == "train.jsonl:1"


def test_images_with_labels(images, caplog):
    lines(
        images / "eval/metadata.jsonl", [{"file_name": "0.jpg", "label": "cat"}, {"file_name": "9.jpg", "label": "x"}]
    )
    done = invoke(images, "data", "leakage", "train", "eval")
    assert done.stdout.splitlines()[0] == "1 of 3 rows (33.33%) are in eval, by their image."
    assert "not compared, since they cannot be read: 0 rows of train, 1 of eval" in done.stdout
    with caplog.at_level("WARNING", "bifocal"):
        invoke(images, "data", "clean", "train", "out", "clean.exclude_rows_of=eval")
    assert "1 rows of 'eval' cannot be read, so they exclude nothing." in caplog.text


def test_fail_above(pairs):
    assert invoke(pairs, "data", "leakage", "train.jsonl", "eval.jsonl", "--fail-above", "2").exit_code == 0
    error = error_of(pairs, "data", "leakage", "train.jsonl", "eval.jsonl", "--fail-above", "1")
    assert error == "Error: 2 rows are leaked, more than --fail-above 1. See runs/leakage.jsonl."
    assert len(leaks(pairs)) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["none.jsonl", "eval.jsonl"], "There is nothing at 'none.jsonl'"),
        (["train.jsonl", "eval.jsonl", "limit=3"], "Write train.limit=3 or evaluation.limit=3."),
        (["train.jsonl", "eval.jsonl", "--out", "."], "is a folder. Give the JSONL file to write with --out."),
        (["train.jsonl", "eval.jsonl", "--out", "train.jsonl"], "is not known as a file of Bifocal's"),
        (["train.jsonl", "eval.jsonl", "--kind", "x"], "'x' is not a kind of rows."),
    ],
)
def test_what_is_wrong_is_named(pairs, words, message):
    assert message in error_of(pairs, "data", "leakage", *words)


def test_nothing_to_compare(images, pairs):
    words = ["data", "leakage", "train", "eval.jsonl", "--kind", "image-only"]
    assert "Nothing of them can be compared." in error_of(images, *words)
