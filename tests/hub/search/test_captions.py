"""An image and its captions are one hit, by whichever matches best; a text that belongs to nothing is another."""

import json

import numpy as np
import pytest

from bifocal.embedding.items import KINDS, Item, normalize
from bifocal.hub.search.captions import find_captions
from bifocal.hub.search.hits import Hit, SearchError
from bifocal.hub.search.index import SearchIndex
from bifocal.hub.search.page import results_html
from bifocal.hub.search.ranking import best_things
from bifocal.hub.search.sync import ItemSource
from bifocal.hub.search.table import Occurrence
from tests.bifocal.commands import error_of, invoke
from tests.hub.search.conftest import sample_items
from tests.hub.search.test_sync import described, index, save_image

DIMENSIONS = 16


def occurrence(name: str, text: str = "", source: int = 0) -> Occurrence:
    return Occurrence(source, name, text)


@pytest.fixture
def made(tmp_path):
    """40 images: every third without captions, the others with up to 7, one of them shared; and 60 texts.

    The captions of an image are near each other, so that the nearest rows are often those of few images.
    """
    random = np.random.default_rng(3)
    rows, things = [], {}
    captions_of = {number: [f"caption {number} {n}" for n in range(number % 8)] for number in range(40) if number % 3}
    for number in range(30, 40):
        captions_of.setdefault(number, []).append("a shared caption")
    vectors = {}

    def vector(text: str, near: np.ndarray | None = None) -> np.ndarray:
        if text not in vectors:
            noise = random.normal(size=DIMENSIONS)
            vectors[text] = normalize((noise if near is None else 4 * near + noise).astype(np.float32))
        return vectors[text]

    shared = []
    for number in range(40):
        captions = captions_of.get(number, [])
        name, centre = f"{number}.jpg", normalize(random.normal(size=DIMENSIONS))
        rows.append(("image", "", [occurrence(name, " · ".join(captions))], vector(name)))
        things[name] = [(None, "image", vector(name))]
        for caption in captions:
            things[name].append((caption, "text", vector(caption, centre)))
            if caption == "a shared caption":
                shared.append(occurrence(f"{name}#caption"))
            else:
                rows.append(("text", caption, [occurrence(f"{name}#caption")], vector(caption)))
    rows.append(("text", "a shared caption", [*shared, occurrence("texts:1", source=1)], vector("a shared caption")))
    things["texts:1"] = [(None, "text", vector("a shared caption"))]
    for number in range(60):
        name = f"text {number}"
        rows.append(("text", name, [occurrence(name, source=1)], vector(name)))
        things[name] = [(None, "text", vector(name))]
    made = SearchIndex.create(
        tmp_path / "index", "model", "weights", DIMENSIONS, [DIMENSIONS, 12], ["float32", "int8"]
    )  # fmt: skip
    for start in range(0, len(rows), 50):
        made.table.append(
            [{"key": f"{start + n:04x}", "kind": kind, "text": text, "occurrences": places, "embedding": embedding,
              "image": b"png" if kind == "image" else None}
             for n, (kind, text, places, embedding) in enumerate(rows[start : start + 50])]
        )  # fmt: skip
    return made, things, rows


def brute_force(things, rows, query: np.ndarray, kinds) -> list[tuple[float, str]]:
    """Ranking score and name of each thing, best first, from all vectors."""
    usual = {kind: np.array([vector @ query for one, _, _, vector in rows if one == kind]) for kind in KINDS}
    ranked = []
    for name, members in things.items():
        if members[0][1] in kinds:
            scores = []
            for _, kind, vector in members:
                score = float(vector @ query)
                if len(kinds) == 2:
                    score = (score - usual[kind].mean()) / usual[kind].std()
                elif kind not in kinds:
                    score = (score - usual["text"].mean()) / usual["text"].std()
                    score = min(usual["image"].mean() + score * usual["image"].std(), 0.999)
                scores.append(score)
            ranked.append((max(scores), name))
    return sorted(ranked, reverse=True)


@pytest.mark.parametrize("kinds", [["image"], ["text"], ["image", "text"]])
def test_things_are_those_of_brute_force(made, kinds):
    index, things, rows = made
    queries = normalize(np.random.default_rng(1).normal(size=(40, DIMENSIONS)).astype(np.float32))
    for k in (1, 5, 30, 200):
        together = index.rank(queries, k, kinds)
        for number, query in enumerate(queries):
            wanted = brute_force(things, rows, query, kinds)
            hits = index.search(query, k, kinds)
            assert [hit.ranking_score for hit in hits] == pytest.approx([score for score, _ in wanted[:k]], abs=1e-4)
            assert len({hit.name for hit in hits}) == len(hits) == min(k, len(wanted)), "k different things"
            assert together.hits(number) == hits, "other queries change nothing"
            for hit in hits:
                members = {caption: (kind, vector) for caption, kind, vector in things[hit.name]}
                _, vector = members[hit.caption]
                assert hit.score == pytest.approx(float(vector @ query), abs=1e-5)
                assert hit.kind == things[hit.name][0][1]
                assert hit.matched == ("caption" if hit.caption else hit.kind)
                assert (hit.thumbnail is None) == (hit.kind == "text")


def test_other_variants_find_as_many_things(made):
    index, _, _ = made
    for query in normalize(np.random.default_rng(2).normal(size=(10, DIMENSIONS)).astype(np.float32)):
        exact = [hit.name for hit in index.search(query, 20)]
        for variant in ((DIMENSIONS, "int8"), (12, "float32")):
            hits = index.search(query, 20, variant=variant)
            assert len({hit.name for hit in hits}) == 20
            assert len({hit.name for hit in hits} & set(exact)) >= 17


def test_images_that_share_a_caption_tie_in_the_order_of_their_own_scores(made):
    index, things, rows = made
    query = next(vector for _, text, _, vector in rows if text == "a shared caption")
    hits = index.search(query, 11)
    assert [hit.score for hit in hits] == pytest.approx([1.0] * 11, abs=1e-5)
    assert [hit.matched for hit in hits] == ["caption"] * 10 + ["text"], "the text of another source is a hit, too"
    assert hits[-1].names == ("texts:1",), "without the names of captions"
    own = [float(things[hit.name][0][2] @ query) for hit in hits[:10]]
    assert own == sorted(own, reverse=True)
    assert [hit.name for hit in index.search(query, 4)] == [hit.name for hit in hits[:4]]
    assert index.counts() == {"image": 40, "text": 61, "caption": len(rows) - 40 - 60}


def test_more_rows_are_asked_for_until_the_things_are_certain():
    rows = [(0.9, 0.9, "c1"), (0.8, 0.8, "c2"), (0.7, 0.7, "t")]
    things = {"c1": ["a", "b"], "c2": ["b", "a"], "t": ["t"], "a": ["a"]}.__getitem__
    assert [match.thing for match in best_things(rows, things, 2, 0.7)] == ["a", "b"]
    assert best_things(rows[:2], things, 3, 0.8) is None
    assert best_things(rows, things, 3, 0.75) is None, "a row between the caption and the text may be missing"
    everything = best_things(rows, things, 9)
    assert [(match.thing, match.row) for match in everything] == [("a", "c1"), ("b", "c1"), ("t", "t")]


def test_a_name_alone_makes_no_caption(new):
    searcher = new()
    image = next(item.image for item in sample_items() if item.kind == "image")
    source, other = (ItemSource({"paths": [name]}) for name in ("one", "two"))
    searcher.add(
        [Item("a.png", "one · a cafe\u0301 · two", image), Item("a.png#caption", " a café "),
         Item("a.png#caption", "caf"), Item("a.png#caption", "one · a café"), Item("b.png#caption", "two")],
        source=source,
    )  # fmt: skip
    searcher.add([Item("a.png#caption", "one")], source=other)
    rows = searcher.index.snapshot().rows
    captions = find_captions(rows)
    texts = np.array(rows.column("text").to_pylist(), dtype=object)
    assert set(texts[captions.is_caption]) == {" a café ", "one · a café"}
    assert set(texts[captions.is_text]) == {"caf", "two", "one"}
    assert searcher.index.counts() == {"image": 1, "text": 3, "caption": 2}
    assert searcher.index.remove(["a.png"]) == 3, "with its two captions"


def test_captions_go_with_their_image(desk):
    folder = desk / "photos"
    described(folder, {"a.png": "a dog", "b.png": "a dog", "c.png": "a cat", "d.png": "a kite"})
    for number, name in enumerate("abcd"):
        save_image(folder / f"{name}.png", number)
    index(desk, "photos", "--captions")
    assert "4 images with 3 captions and 0 texts" in index(desk, "photos")
    assert "1 deleted; index has 6 left." in invoke(desk, "remove", "index", "a.png").stdout, "its caption is b's, too"
    assert "2 deleted; index has 4 left." in invoke(desk, "remove", "index", "b.*").stdout
    rows = SearchIndex(desk / "index").snapshot().rows.to_pylist()
    key = next(row["key"] for row in rows if row["name"] == "c.png")
    assert "2 deleted; index has 2 left." in invoke(desk, "remove", "index", key).stdout
    index(desk, "photos")
    (folder / "d.png").unlink()
    described(folder, {"a.png": "a dog", "b.png": "a dog", "c.png": "a cat"})
    assert "2 items in the index are missing" in index(desk, "photos")
    assert "2 pruned; index has 3 images with 2 captions and 0 texts" in index(desk, "photos", "--prune")
    assert "1 deleted; index has 4 left." in invoke(desk, "remove", "index", "c.png#caption").stdout
    assert SearchIndex(desk / "index").counts() == {"image": 3, "text": 0, "caption": 1}


def test_the_commands_say_what_matched(desk):
    lines = [{"file_name": "a.png", "caption": ["a fire engine", "red"]}, {"file_name": "b.png", "caption": "a boat"}]
    (desk / "photos").mkdir()
    (desk / "photos" / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for number, line in enumerate(lines):
        save_image(desk / "photos" / line["file_name"], number)
    index(desk, "photos", "--captions")
    first, second = invoke(desk, "search", "index", "a fire engine").stdout.splitlines()
    assert first.endswith("1.000  image  a.png  a fire engine · red  (its caption: a fire engine)")
    assert "image  b.png  a boat" in second
    assert "b.png  a boat  (its caption)" in invoke(desk, "search", "index", "a boat").stdout
    hits = json.loads(invoke(desk, "search", "index", "a fire engine", "--only", "image", "--json").stdout)
    assert [hit["name"] for hit in hits] == ["a.png", "b.png"]
    assert (hits[0]["kind"], hits[0]["matched"], hits[0]["caption"]) == ("image", "caption", "a fire engine")
    by_image = json.loads(invoke(desk, "search", "index", "--image", "photos/b.png", "--json", "-k", "1").stdout)
    assert (by_image[0]["name"], by_image[0]["matched"], by_image[0]["caption"]) == ("b.png", "image", None)
    refused = error_of(desk, "search", "index", "a boat", "--only", "text")
    assert "'index' has no texts except captions, which belong to their images." in refused
    with pytest.raises(SearchError, match="'video' cannot be searched for"):
        SearchIndex(desk / "index").search(np.ones(40), kinds=["video"])


def test_a_card_names_the_caption_that_matched():
    several = Hit("a.png", "image", "a <dog> · a pet", 0.9, 2.0, b"\x89PNG", ("a.png",), "a <dog>")
    assert '<p class="bf-matched">Matched its caption: a &lt;dog&gt;</p>' in results_html({"": [several]})
    single = Hit("a.png", "image", "a dog", 0.9, 2.0, b"\x89PNG", ("a.png",), "a dog")
    assert '<p class="bf-matched">Matched its caption</p>' in results_html({"": [single]})
    assert "bf-matched" not in results_html({"": [Hit("a.png", "image", "a dog", 0.9, 2.0, b"\x89PNG")]})
