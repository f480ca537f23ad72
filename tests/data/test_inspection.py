"""The page about a source: its figures are right, and it opens in a browser."""

import json
from dataclasses import asdict

import pytest

from bifocal.data.inspection import inspect_source
from bifocal.data.inspection_page import write_data_page
from bifocal.data.loading import infer_kind
from bifocal.data.source import Source
from bifocal.errors import DataError
from tests.browser import LONG_NAME, needs_browser, odd_images, opened
from tests.data.files import image_bytes, lines, shards


@pytest.fixture
def folder(tmp_path):
    """Six images: one twice, one broken, one too small for the filter, one with a caption that is markup."""
    for number in range(6):
        size = (10, 10) if number == 3 else (64, 48)
        (tmp_path / f"{number}.jpg").write_bytes(image_bytes(size, seed=min(number, 4)))
    (tmp_path / "1.jpg").write_bytes(b"<html>no image</html>")
    captions = ["one", "two", "", "four", "<script>alert(1)</script>", "long " * 200]
    lines(tmp_path / "metadata.jsonl", [{"file_name": f"{n}.jpg", "caption": text} for n, text in enumerate(captions)])
    return tmp_path


def test_figures(folder):
    found = inspect_source(Source(path=str(folder), clean={"min_image_size": 16}), "image-text")
    assert (found.rows, found.good, found.complete) == (6, 3, True)
    assert {cause["cause"]: (cause["count"], cause["filtered"]) for cause in found.skipped} == {
        "not an image": (1, False), "no caption": (1, False), "small image": (1, True),
    }  # fmt: skip
    assert found.duplicates == {"images": 1, "texts": 0}
    assert found.lengths == {"caption": [3, 25, 999]}
    assert found.sizes == [(64, 48)] * 3
    assert len(found.sample) == 3
    part = inspect_source(Source(path=str(folder)), "image-text", max_rows=2)
    assert (part.rows, part.complete) == (2, False)


def test_texts_and_kinds(tmp_path):
    rows = [{"query": "a", "positive": "B  c", "negatives": ["n"] * (1 + n % 2)} for n in range(4)]
    path = lines(tmp_path / "a.jsonl", rows)
    assert infer_kind(Source(path=str(path))) == "text-triplet"
    found = inspect_source(Source(path=str(path)), "text-triplet")
    assert found.counts == [1, 2, 1, 2]
    assert found.duplicates == {"texts": 3}, "as the filter counts them, whatever the negatives"
    assert infer_kind(Source(path=shards(tmp_path / "s", [2]))) == "image-text"
    assert infer_kind(Source(path=str(lines(tmp_path / "p.jsonl", [{"anchor": "a", "positive": "b"}])))) == "text-pair"
    assert infer_kind(Source(path=str(lines(tmp_path / "t.jsonl", [{"text": "a"}])))) == "text-only"
    with pytest.raises(
        DataError, match=r"Cannot infer the kind of rows of '.*' from its columns \(a\). Name it with --kind"
    ):
        infer_kind(Source(path=str(lines(tmp_path / "x.jsonl", [{"a": "a"}]))))


def test_the_symbols_too():
    found = inspect_source(
        Source(path="symbols", split="test", column_mapping={"images": "image", "name": "caption"}),
        "image-text",
        max_rows=20,
    )
    assert (found.good, found.complete) == (20, False)


@needs_browser
def test_in_a_browser(folder):
    page_file = folder / "page.html"
    for number, image in enumerate(odd_images().values(), 10):
        image.save(folder / f"{number}.png")
        with (folder / "metadata.jsonl").open("a") as file:
            file.write(json.dumps({"file_name": f"{number}.png", "caption": LONG_NAME}) + "\n")
    write_data_page(
        asdict(inspect_source(Source(path=str(folder), clean={"min_image_size": 2}), "image-text")), page_file
    )
    with opened(page_file) as page:
        text = page.locator("body").inner_text()
        for said in ("usable, 81.8%", "not an image", "<script>alert(1)</script>", "1.jpg"):
            assert said in text
        assert page.locator("img").count() == 9 + 2
