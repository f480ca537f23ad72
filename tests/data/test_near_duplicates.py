"""Near-duplicates that Pillow and small edits make are found, different rows are not, and the first one stays."""

import io
import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from bifocal.data import leakage, near_duplicates
from bifocal.data.clean_copy import write_clean
from bifocal.data.filters import comparable_text
from bifocal.data.inspection import inspect_source
from bifocal.data.leakage import find_leaks
from bifocal.data.loading import iter_rows, load_source
from bifocal.data.near_duplicates import (
    band_shape,
    first_of_groups,
    missing_probability,
    near_duplicate_images,
    similar_images,
    similar_texts,
)
from bifocal.data.row_names import row_name
from bifocal.data.signatures import Signatures, character_ngrams, sign_image, sign_texts
from bifocal.data.skips import RowError, SkipLog
from bifocal.data.source import Source
from tests.bifocal.commands import error_of, invoke
from tests.data.files import image_bytes, lines

SENTENCES = [
    "Two young guys with shaggy hair look at their hands while hanging out in the yard.",
    "Several men in hard hats are operating a giant pulley system.",
    "A child in a pink dress is climbing up a set of stairs in an entry way.",
    "Someone in a blue shirt and hat is standing on stair and leaning against a window.",
    "Two men, one in a gray shirt, one in a black shirt, standing near a stove.",
    "A man sits in a chair while holding a large stuffed animal of a lion.",
]


def encoded(image: Image.Image, form: str = "JPEG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def altered(content: bytes) -> dict[str, bytes]:
    image = Image.open(io.BytesIO(content))
    return {
        "JPEG": encoded(image, quality=60),
        "WebP": encoded(image, "WEBP", quality=70),
        "half": encoded(image.resize((image.width // 2, image.height // 2), Image.Resampling.BICUBIC)),
        "brighter": encoded(ImageEnhance.Brightness(image).enhance(1.1)),
    }


def images_of(contents: list[bytes]) -> Signatures:
    return Signatures.of_images([str(n) for n in range(len(contents))], [sign_image(c) for c in contents])


@pytest.mark.parametrize("change", ["JPEG", "WebP", "half", "brighter"])
def test_altered_images_are_found_and_others_are_not(change):
    originals = [image_bytes((160, 120), seed=seed) for seed in range(30)]
    signatures = images_of([*originals, *(altered(content)[change] for content in originals)])
    pairs = {tuple(pair) for pair in similar_images(signatures, 8).tolist()}
    assert not pairs - {(30 + number, number) for number in range(30)}
    assert len(pairs) >= 29


def test_colour_tells_images_apart_and_plain_ones_are_not_compared():
    image = Image.open(io.BytesIO(image_bytes((160, 120))))
    red, green, blue = image.split()
    recoloured = Image.merge("RGB", (green, blue, red)).convert("RGB")
    grey = image.convert("L")
    tinted = Image.merge("RGB", (grey, grey.point(lambda v: v // 3), grey.point(lambda v: v // 3)))
    shades = [encoded(Image.merge("RGB", (c, c, c)), "PNG") for c in [grey]]
    assert recoloured.size == image.size
    signatures = images_of([shades[0], encoded(tinted, "PNG")])
    hashes = signatures.hashes
    assert hashes is not None
    assert np.unpackbits(hashes[0] ^ hashes[1]).sum() <= 8, "the hash alone cannot tell them apart"
    assert not len(similar_images(signatures, 8))
    plain = [encoded(Image.new("RGB", (64, 64), colour), "PNG") for colour in ("red", "#fe0000", "white", "white")]
    assert not len(similar_images(images_of(plain), 16))


@pytest.mark.parametrize(("most", "parts"), [(0, 2), (0, 4), (3, 2), (3, 3), (8, 2), (8, 3), (8, 7), (16, 4), (16, 5)])
def test_pairs_of_hashes_equal_brute_force(most, parts, monkeypatch):
    monkeypatch.setattr(near_duplicates, "_hash_parts", lambda *_: parts)
    draws = np.random.default_rng(0)
    hashes = draws.integers(0, 256, (300, 8), dtype=np.uint8)
    for number in range(150):  # neighbours at every distance
        bits = np.unpackbits(hashes[number])
        bits[draws.choice(64, number % 20, replace=False)] ^= 1
        hashes[150 + number] = np.packbits(bits)
    colours = draws.integers(0, 3, (300, 192), dtype=np.uint8) + 100
    signatures = Signatures(list("x" * 300), hashes, colours, np.zeros(300, bool))
    distance = np.unpackbits(hashes[:, None] ^ hashes[None], axis=2).sum(axis=2)
    expected = {(i, j) for i in range(300) for j in range(i) if distance[i, j] <= most}
    assert {tuple(pair) for pair in similar_images(signatures, most).tolist()} == expected
    other = Signatures([], hashes[:100], colours[:100], np.zeros(100, bool))
    expected = {(i, j) for i in range(300) for j in range(100) if distance[i, j] <= most}
    assert {tuple(pair) for pair in similar_images(signatures, most, other).tolist()} == expected


def test_more_hashes_are_looked_up_by_longer_substrings():
    assert [near_duplicates._hash_parts(hashes, 8) for hashes in (10, 10**5, 10**9)] == [5, 3, 2]


def edited(text: str, number: int) -> str:
    words = text.split()
    place = number % (len(words) - 1)
    return [" ".join(words[:place] + words[place + 1 :]), text.upper().replace(" ", "  "), text + "!"][number % 3]


def test_pairs_of_texts_against_all_pairs():
    draws = np.random.default_rng(1)
    words = " ".join(SENTENCES).lower().split()
    texts = [" ".join(draws.choice(words, 14)) for _ in range(150)]
    texts += [edited(text, number) for number, text in enumerate(texts)]
    compared = [comparable_text(text) for text in texts]
    grams = [character_ngrams(text) for text in compared]
    jaccard = np.array([[len(a & b) / len(a | b) for b in grams] for a in grams])
    pairs = {tuple(pair) for pair in similar_texts(Signatures([], texts={"text": sign_texts(compared)}), 0.8).tolist()}
    sure = {(i, j) for i in range(300) for j in range(i) if jaccard[i, j] >= 0.9}
    maybe = {(i, j) for i in range(300) for j in range(i) if jaccard[i, j] >= 0.68}  # 3.5 standard errors below
    assert len(sure) > 90
    assert sure <= pairs <= maybe


def test_every_text_of_a_row_counts():
    passages = [SENTENCES[0]] * 3
    queries = ["who hangs out in the yard", "what colour is their long hair", "who hangs out in the yards"]
    signatures = Signatures([], texts={"query": sign_texts(queries), "positive": sign_texts(passages)})
    assert similar_texts(signatures, 0.8).tolist() == [[2, 0]]


@pytest.mark.parametrize("columns", [1, 2])
@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.8, 0.9, 1.0])
def test_few_pairs_at_the_threshold_are_missed(threshold, columns):
    bands, width = band_shape(threshold, columns)
    assert bands * width <= 128
    assert missing_probability(threshold, bands, width, columns) <= 0.01


def test_a_chain_is_not_one_group():
    assert first_of_groups(np.array([[1, 0], [2, 1], [3, 2]])) == {1: 0, 3: 2}
    assert first_of_groups(np.empty((0, 2), int)) == {}


@pytest.fixture
def folder(tmp_path):
    """Photos, the fourth and the sixth of them altered copies of the first, the fifth the same bytes as the second."""
    first = [image_bytes((160, 120), seed=seed) for seed in range(3)]
    copies = altered(first[0])
    for number, content in enumerate([*first, copies["JPEG"], first[1], copies["half"]]):
        (tmp_path / f"{number}.jpg").write_bytes(content)
    lines(tmp_path / "metadata.jsonl", [{"file_name": f"{n}.jpg", "caption": f"number {n}"} for n in range(6)])
    return tmp_path


def test_clean_keeps_the_first_of_each_group(folder):
    skipped = SkipLog(folder / "out" / "skipped.jsonl")
    source = Source(path=str(folder), clean={"near_duplicate_images": 8})
    assert write_clean(source, "image-text", folder / "out", skipped) == 3
    log = [json.loads(line) for line in (folder / "out" / "skipped.jsonl").read_text().splitlines()]
    assert [(entry["row"], entry["detail"]) for entry in log] == [
        ("metadata.jsonl:4", "near-duplicate of metadata.jsonl:1"),
        ("metadata.jsonl:5", "near-duplicate of metadata.jsonl:2"),
        ("metadata.jsonl:6", "near-duplicate of metadata.jsonl:1"),
    ]
    assert {(entry["cause"], entry["filtered"]) for entry in log} == {("near-duplicate image", True)}
    rows = load_source(f"{folder}/out/*.parquet", "image-text")
    assert [row["caption"] for row in rows] == [["number 0"], ["number 1"], ["number 2"]]


def test_clean_of_texts_over_files(tmp_path):
    lines(tmp_path / "a.jsonl", [{"text": text} for text in SENTENCES[:4]])
    lines(tmp_path / "b.jsonl", [{"text": SENTENCES[1].replace("giant ", "")}, {"text": SENTENCES[4]}])
    done = invoke(tmp_path, "data", "clean", "[ab].jsonl", "out", "clean.near_duplicate_texts=0.75")
    assert done.stdout == "5 rows are in out; skipped: 1 near-duplicate text (see out/skipped.jsonl).\n"
    assert json.loads((tmp_path / "out/skipped.jsonl").read_text())["detail"] == "near-duplicate of a.jsonl:2"


def test_inspect_counts_and_shows_them(folder):
    inspection = inspect_source(Source(path=str(folder)), "image-text")
    assert inspection.duplicates["images"] == 1
    about = inspection.near_duplicates["images"]
    assert about["count"] == 2, "equal images are counted as duplicates"
    assert [(later["name"], earlier["name"]) for later, earlier in about["pairs"]] == [
        ("metadata.jsonl:4", "metadata.jsonl:1"),
        ("metadata.jsonl:6", "metadata.jsonl:1"),
    ]
    invoke(folder, "data", "inspect", ".")
    page = (folder / "runs/data.html").read_text()
    assert "Near-duplicate images" in page
    assert "clean.near_duplicate_images=8" in page
    assert "near-duplicate texts" in page


@pytest.mark.parametrize("setting", ["near_duplicate_texts", "near_duplicate_images", "exclude_rows_of"])
def test_every_reader_applies_the_filters(folder, setting):
    evaluation = lines(folder / "evaluation.jsonl", [{"image": "2.jpg", "caption": "x"}])
    lines(folder / "metadata.jsonl", [{"file_name": f"{n}.jpg", "caption": SENTENCES[n % 4]} for n in range(6)])
    value = {"near_duplicate_texts": 0.8, "near_duplicate_images": 8, "exclude_rows_of": [str(evaluation)]}[setting]
    source = Source(path=str(folder), clean={setting: value})
    loaded, skipped = load_source(source, "image-text"), SkipLog()
    rows = list(iter_rows(source, "image-text"))
    assert [name for name, _ in rows] == [f"metadata.jsonl:{n}" for n in range(1, 7)]
    good = [(name, row["caption"]) for name, row in rows if isinstance(row, dict)]
    assert good == [(row_name(loaded, number), row["caption"]) for number, row in enumerate(loaded)]
    assert 0 < len(good) < 6
    load_source(source, "image-text", skipped=skipped)
    causes = Counter(row.cause for _, row in rows if isinstance(row, RowError))
    assert skipped.filtered == {source.title: causes}
    inspection = inspect_source(source, "image-text")
    assert (inspection.rows, inspection.good) == (6, len(good))
    assert {cause["cause"]: cause["count"] for cause in inspection.skipped} == causes


def test_near_duplicates_are_searched_again_only_when_an_image_changes(folder, monkeypatch):
    source = Source(path=str(folder), clean={"near_duplicate_images": 8})
    searched = []
    monkeypatch.setattr(near_duplicates, "similar_images", lambda *args: searched.append(1) or similar_images(*args))
    logs = [SkipLog(), SkipLog()]
    captions = [load_source(source, "image-text", skipped=log)[:]["caption"] for log in logs]
    assert captions[0] == captions[1]
    assert logs[0].first == logs[1].first
    assert len(searched) == 1
    (folder / "3.jpg").write_bytes(image_bytes((160, 120), seed=9))
    assert len(load_source(source, "image-text")) == 4
    assert len(searched) == 2


def test_leaks_are_searched_again_only_when_a_source_changes(tmp_path, monkeypatch):
    lines(tmp_path / "a.jsonl", [{"text": text} for text in SENTENCES])
    source = Source(path=str(tmp_path / "a.jsonl"), clean={"exclude_rows_of": str(tmp_path / "b.jsonl")})
    searched = []
    monkeypatch.setattr(leakage, "find_leaks", lambda *args: searched.append(1) or find_leaks(*args))
    for numbers, searches in (([1], 1), ([1], 1), ([1, 4], 2), ([1], 2)):
        lines(tmp_path / "b.jsonl", [{"text": SENTENCES[number]} for number in numbers])
        log = SkipLog()
        kept = load_source(source, "text-only", skipped=log)[:]["text"]
        assert kept == [text for number, text in enumerate(SENTENCES) if number not in numbers]
        assert log.filtered == {source.title: {"text of an excluded source": len(numbers)}}
        assert log.first[source.title, "text of an excluded source"].row == "a.jsonl:2"
        assert len(searched) == searches


def test_many_similar_images_equal_brute_force(monkeypatch):
    monkeypatch.setattr(near_duplicates, "_SEARCHED", 7)
    draws = np.random.default_rng(0)
    hashes = np.packbits(draws.random((60, 64)) < 0.06, axis=1)
    colours = draws.choice([90, 110, 124], (60, 1)).astype(np.uint8) + draws.integers(0, 34, (60, 192), dtype=np.uint8)
    hashes[40:], colours[40:] = hashes[:20], colours[:20]  # equal ones are paired with the first only
    rows = Signatures([], hashes, colours, np.zeros(60, bool))
    distance = np.unpackbits(hashes[:, None] ^ hashes[None], axis=2).sum(axis=2)
    everything = np.stack(np.indices((60, 60)), axis=2).reshape(-1, 2)
    same = near_duplicates._same_colours(colours, colours, everything).reshape(60, 60)
    near = (distance <= 8) & (same | same.T)
    expected = {(i, j) for i in range(40) for j in range(i) if near[i, j]} | {(i + 40, i) for i in range(20)}
    assert 100 < len(expected) < 40 * 39 // 2
    found = similar_images(rows, 8)
    assert found.tolist() == sorted(map(list, expected))
    assert near_duplicate_images(rows, 8).keys() == greedy(near), "also of rows that equal a skipped one"


def greedy(near: np.ndarray) -> set[int]:
    """The rows that have an earlier one that stays, by all pairs."""
    skipped: set[int] = set()
    for row in range(len(near)):
        if any(near[row, other] and other not in skipped for other in range(row)):
            skipped.add(row)
    return skipped


def test_copies_of_a_skipped_row_are_skipped(tmp_path):
    text = "a dog runs over the green meadow behind the old house"
    rows = [text, text + "s", text + "s", "another one", text + "s"]
    path = lines(tmp_path / "a.jsonl", [{"text": row} for row in rows])
    source = Source(path=str(path), clean={"near_duplicate_texts": 0.8})
    assert load_source(source, "text-only")["text"][:] == [text, "another one"]


@pytest.mark.parametrize("setting", ["images=17", "images=-1", "texts=0.3", "texts=1.5"])
def test_wrong_thresholds(tmp_path, setting):
    lines(tmp_path / "a.jsonl", [{"text": "a"}])
    name, _, value = setting.partition("=")
    assert f"'near_duplicate_{name}' is {value}" in error_of(
        tmp_path, "data", "clean", "a.jsonl", "out", f"clean.near_duplicate_{setting}"
    )


def test_streams_cannot_be_compared(tmp_path):
    path = lines(tmp_path / "a.jsonl", [{"text": "a"}])
    for clean in ({"near_duplicate_texts": 0.8}, {"exclude_rows_of": "b.jsonl"}):
        with pytest.raises(ValueError, match="can only be found among all rows"):
            load_source(Source(path=str(path), streaming=True, clean=clean), "text-only")
