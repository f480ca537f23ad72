"""An approximate index: recall as it says, exact scores, rare kinds found, and files that are rebuilt when damaged."""

import json
import os
import re
import threading

import numpy as np
import pytest

from bifocal.embedding.items import normalize
from bifocal.hub.search import approximate
from bifocal.hub.search.index import SearchIndex
from bifocal.hub.search.lock import index_lock
from bifocal.hub.search.settings import Variant
from bifocal.hub.search.table import Occurrence
from tests.bifocal.commands import error_of, invoke

DIMENSIONS = 24
IMAGES, CAPTIONS, TEXTS = 1500, 600, 30


@pytest.fixture(autouse=True)
def small_groups_are_large(monkeypatch):
    monkeypatch.setattr(approximate, "MIN_ROWS", 500)


@pytest.fixture(scope="module")
def rows():
    """Images and captions in clusters of their own, and a few texts."""
    random = np.random.default_rng(0)
    centres = random.normal(size=(40, DIMENSIONS))

    def vector(offset: float) -> np.ndarray:
        noise = 0.6 * random.normal(size=DIMENSIONS)
        return normalize((centres[random.integers(40)] + noise + offset).astype(np.float32))

    rows = [
        {"key": f"i{n}", "kind": "image", "text": "", "image": b"png", "embedding": vector(1.0),
         "occurrences": [Occurrence(0, f"{n}.jpg", f"caption {n}" if n < CAPTIONS else "")]} for n in range(IMAGES)
    ]  # fmt: skip
    rows += [
        {"key": f"c{n}", "kind": "text", "text": f"caption {n}", "image": None, "embedding": vector(-1.0),
         "occurrences": [Occurrence(0, f"{n}.jpg#caption", "")]} for n in range(CAPTIONS)
    ]  # fmt: skip
    rows += [
        {"key": f"t{n}", "kind": "text", "text": f"text {n}", "image": None, "embedding": vector(-1.0),
         "occurrences": [Occurrence(1, f"text {n}", "")]} for n in range(TEXTS)
    ]  # fmt: skip
    return [rows[n] for n in random.permutation(len(rows))]


@pytest.fixture
def index(rows, tmp_path) -> SearchIndex:
    """An index with an exhaustive variant and two approximate ones."""
    folder = tmp_path / "index"
    made = SearchIndex.create(folder, "model", "weights", DIMENSIONS)
    for start in range(0, len(rows), 300):
        made.table.append(rows[start : start + 300])
    for dims, precisions in ((), ("float32",)), ((16,), ("int8",)):
        made = SearchIndex.create(folder, "model", "weights", DIMENSIONS, dims, precisions, approximate=True)
    return made


APPROXIMATE = Variant(DIMENSIONS, "float32", True), Variant(16, "int8", True)


@pytest.mark.parametrize("variant", APPROXIMATE)
def test_recall_is_what_it_says_and_scores_are_exact(index, rows, variant):
    assert index.choose_variant() == (DIMENSIONS, "float32", False), "the exhaustive one stays the default"
    claim = index.describe(variant)
    match = re.search(r"^Approximate search: recall@10 is (\d\.\d+), measured with 256 images and 256 texts", claim)
    recall = float(match[1])
    assert (0.95 if variant.precision == "float32" else 0.8) <= recall <= 1
    assert index.describe() == ""
    of_kind = {kind: np.array([row["embedding"] for row in rows if row["kind"] == kind]) for kind in ("image", "text")}
    for kind, queries in of_kind.items():
        exact, found = (index.rank(queries[:100], 11, ["image"], one) for one in (None, variant))
        same = []
        for number, query in enumerate(queries[:100]):
            wanted, hits = exact.hits(number), found.hits(number)
            assert len({hit.name for hit in hits}) == 11
            scores = {hit.name: hit.score for hit in index.search(query, IMAGES, ["image"])} if number < 2 else {}
            assert all(hit.score == pytest.approx(scores.get(hit.name, hit.score), abs=1e-5) for hit in hits)
            same.append(len({hit.name for hit in wanted} & {hit.name for hit in hits}) / 11)
        assert np.mean(same) >= recall - 0.05, kind
    groups = index._open().faiss(variant).groups.items()
    lists = {group: (one.nprobe, one.nlist) for group, one in groups if hasattr(one, "nprobe")}
    assert set(lists) == {"image", "caption"}, "the few texts are searched exhaustively"
    assert any(probes < count for probes, count in lists.values())


def test_a_rare_kind_is_found_whole_and_alone_as_together(index, rows):
    queries = np.array([row["embedding"] for row in rows[:40]])
    for kinds in (["text"], ["image"], ["image", "text"]):
        exact, found = (index.rank(queries, 40, kinds, one) for one in (None, APPROXIMATE[0]))
        for number, query in enumerate(queries):
            hits = found.hits(number)
            assert hits == index.search(query, 40, kinds, APPROXIMATE[0]), "other queries change nothing"
            if kinds == ["text"]:
                assert len(hits) == TEXTS
                assert hits == exact.hits(number)
    everything = index.search(queries[0], 5000, variant=APPROXIMATE[0])
    assert len({hit.name for hit in everything}) == IMAGES + TEXTS


@pytest.mark.parametrize("damage", ["cut", "numbers", "gone", "facts", "claim"])
def test_damaged_files_are_rebuilt_as_they_were(index, damage):
    folder, query = index.folder / "faiss", np.ones(DIMENSIONS)
    before = index.search(query, 5, variant=APPROXIMATE[0])
    contents = {path.name: path.read_bytes() for path in folder.iterdir()}
    file = next(folder.glob(f"{DIMENSIONS}-float32-approximate-image.*.faiss"))
    facts = next(folder.glob("*.json"))
    if damage == "cut":
        file.write_bytes(contents[file.name][:-200])
    elif damage == "numbers":
        file.write_bytes(contents[file.name][:-200] + os.urandom(64) + contents[file.name][-136:])
    elif damage == "gone":
        file.unlink()
    else:
        facts.write_bytes(b'{"recall": 1.0' if damage == "facts" else b'{"recall": 1.0, "queries": {}, "files": {}}')
    again = SearchIndex(index.folder)
    assert again.search(query, 5, variant=APPROXIMATE[0]) == before
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == contents
    (folder / "24-float32-approximate.mine.json").write_text("mine")
    again.remove(["1*.jpg"])
    kept = {path.name for path in folder.iterdir()}
    assert not kept & set(contents), "what was made of an earlier table is deleted"
    assert "24-float32-approximate.mine.json" in kept


def test_no_file_keeps_what_was_removed(index):
    folder = index.folder / "faiss"
    index._open().build()
    assert len(list(folder.iterdir())) == 9, "three groups and facts of each approximate variant"
    (folder / "24-float32.mine.faiss").write_text("mine")
    assert index.remove(["*.jpg"]) == IMAGES + CAPTIONS
    state = next(folder.glob("24-float32-approximate.*.json")).name.split(".")[1]
    names = ["16-int8-approximate", "16-int8-approximate-text", "24-float32", "24-float32-approximate",
             "24-float32-approximate-text"]  # fmt: skip
    expected = {f"{name}.{state}.{'json' if name.endswith('approximate') else 'faiss'}" for name in names}
    assert {path.name for path in folder.iterdir()} == {"24-float32.mine.faiss", *expected}
    index.remove(["*"])
    assert [path.name for path in folder.iterdir()] == ["24-float32.mine.faiss"]


def test_a_small_index_is_searched_exhaustively(index, monkeypatch):
    monkeypatch.setattr(approximate, "MIN_ROWS", 5000)
    assert SearchIndex(index.folder).describe(APPROXIMATE[0]) == "Exhaustive search, since no kind has 5,000 rows."
    query = np.ones(DIMENSIONS)
    exact = index.search(query, 20)
    assert SearchIndex(index.folder).search(query, 20, variant=APPROXIMATE[0]) == exact


def test_a_state_that_is_being_changed_is_searched_as_it_was(index):
    searched = SearchIndex(index.folder)
    before = searched.search(np.ones(DIMENSIONS), 5, variant=APPROXIMATE[0])
    with index_lock(index.folder):
        searched.table.append([{"key": "x", "kind": "text", "text": "new", "image": None,
                                "embedding": normalize(np.ones(DIMENSIONS, np.float32)),
                                "occurrences": [Occurrence(1, "new", "")]}])  # fmt: skip
        found: list = []
        thread = threading.Thread(
            target=lambda: found.extend(searched.search(np.ones(DIMENSIONS), 5, variant=APPROXIMATE[0]))
        )
        thread.start()
        thread.join()
        assert found == before
    assert searched.search(np.ones(DIMENSIONS), 1, ["text"], APPROXIMATE[0])[0].name == "new"


def test_the_commands_say_how_good_it_is(desk, monkeypatch):
    monkeypatch.setattr(approximate, "MIN_ROWS", 60)
    (desk / "texts.jsonl").write_text("".join(json.dumps({"text": f"a {n % 7} star {n}"}) + "\n" for n in range(80)))
    done = invoke(desk, "index", "texts.jsonl", "index", "--model", "model", "--approximate")
    assert done.exit_code == 0, done.stderr
    claim = re.search(r"^40 float32 approximate: (Approximate search: recall@10 is .*)$", done.stdout, re.MULTILINE)
    assert claim, done.stdout
    assert SearchIndex(desk / "index").variants == [(40, "float32", True)]
    shown = invoke(desk, "search", "index", "a 3 star 3", "--json")
    assert claim[1] in shown.stderr
    assert json.loads(shown.stdout)[0]["score"] == pytest.approx(1.0, abs=1e-5)
    invoke(desk, "index", "texts.jsonl", "index")
    assert SearchIndex(desk / "index").variants == [(40, "float32", True)], "none that was not asked for"
    invoke(desk, "index", "texts.jsonl", "index", "--precision", "float32")
    assert "recall" not in invoke(desk, "search", "index", "a 3 star 3").stderr
    assert "recall" in invoke(desk, "search", "index", "a 3 star 3", "--approximate").stderr
    invoke(desk, "index", "texts.jsonl", "exact", "--model", "model")
    for command in (["search", "exact", "a star"], ["serve", "exact"]):
        assert "'exact' has no approximate form. Add one with" in error_of(desk, *command, "--approximate")
    assert "Omit it with --space and --static." in error_of(desk, "serve", "index", "--space", "space", "--approximate")
    refused = error_of(desk, "search", "index", "a star", "--dim", "16", "--approximate")
    assert "cannot be searched by 16 dimensions in float32, approximately, only by 40 float32 approx" in refused
