"""The index: hits against brute force, nothing twice, nothing lost when it is killed, nothing left when deleted."""

import threading
import time

import numpy as np
import pytest
import torch
from datasets import load_dataset
from PIL import Image

from bifocal.embedding.items import Item, ItemError, decode_item
from bifocal.embedding.models import weights_hash
from bifocal.errors import ModelError
from bifocal.hub.search import index as index_module
from bifocal.hub.search.hits import SearchError
from bifocal.hub.search.index import SearchIndex
from bifocal.hub.search.searcher import Searcher
from bifocal.hub.search.sync import ItemSource
from bifocal.hub.search.table import Table
from bifocal.modeling import BifocalModel
from bifocal.modeling.image_batches_bifocal import ImagePreparer
from tests.conftest import small_config
from tests.hub.search.conftest import sample_items
from tests.modeling.test_images import photo
from tests.processes import run


def brute_force(searcher: Searcher, vector: np.ndarray, kind: str) -> list[tuple[str, float]]:
    """Names and scores by the model's own vectors, with nothing of the index."""
    chosen = [item for item in sample_items() if item.kind == kind]
    if kind == "text":
        vectors = searcher.model.model.encode_text([item.text for item in chosen], show_progress=False)
    else:
        vectors = searcher.model.model.encode_image([item.image for item in chosen], show_progress=False)
    scores = vectors @ vector
    return [(chosen[n].name, float(scores[n])) for n in np.argsort(-scores, kind="stable")]


@pytest.mark.parametrize("kind", ["image", "text"])
def test_hits_are_those_of_brute_force(searcher, kind):
    vector = searcher.vector("a blue star")
    wanted = brute_force(searcher, vector, kind)
    found = searcher.index.search(vector, 64, [kind])
    assert [hit.name for hit in found][:5] == [name for name, _ in wanted][:5]
    assert np.allclose([hit.score for hit in found], [score for _, score in wanted], atol=1e-5)
    assert all((hit.thumbnail is not None) == (kind == "image") for hit in found)


@pytest.mark.parametrize("form", [(40, "int8"), (16, "float32"), (16, "int8")])
def test_other_forms_score_with_the_whole_vectors(new, form):
    searcher = new([16, 40], ["float32", "int8"])
    searcher.add(sample_items())
    vector = searcher.vector("a green ring")
    exact = searcher.index.search(vector, 10, ["text"])
    found = searcher.index.search(vector, 10, ["text"], form)
    scores = {hit.name: hit.score for hit in searcher.index.search(vector, 64, ["text"])}
    assert all(hit.score == pytest.approx(scores[hit.name], abs=1e-6) for hit in found)
    assert len({hit.name for hit in found} & {hit.name for hit in exact}) >= 8
    size = {p.name.split(".")[0]: p.stat().st_size for p in (searcher.index.folder / "faiss").glob("*.faiss")}
    assert size["40-int8"] < 0.4 * size["40-float32"]
    with pytest.raises(SearchError, match="cannot be searched by 20 dimensions in int8, only by 16 float32, 16 int8"):
        searcher.index.search(vector, 10, variant=(20, "int8"))


def test_one_ranking_makes_kinds_comparable(searcher):
    vector = searcher.vector("a red circle on paper")
    means = {}
    for kind in ("image", "text"):
        scores = np.array([score for _, score in brute_force(searcher, vector, kind)])
        means[kind] = (scores.mean(), scores.std())
    found = searcher.index.search(vector, 128)
    assert [hit.ranking_score for hit in found] == sorted((hit.ranking_score for hit in found), reverse=True)
    for hit in found:
        mean, deviation = means[hit.kind]
        assert hit.ranking_score == pytest.approx((hit.score - mean) / deviation, abs=1e-3)
    assert {hit.kind for hit in found[:20]} == {"image", "text"}


def test_both_is_between_the_two(searcher):
    query_image = {item.name: item.image for item in sample_items()}["drawings/9.png"]
    text, image = searcher.vector("a black cross"), searcher.vector(image=query_image)
    both = searcher.vector("a black cross", query_image, 0.25)
    wanted = 0.25 * text + 0.75 * image
    assert np.allclose(both, wanted / np.linalg.norm(wanted), atol=1e-6)
    assert np.allclose(searcher.vector("a black cross", query_image, 1.0), text, atol=1e-6)
    with pytest.raises(SearchError, match="Enter a text, an image or both"):
        searcher.vector("  ")


def test_nothing_is_embedded_twice(new):
    searcher = new()
    first = searcher.add(sample_items())
    assert (first.new, first.known) == (128, 0)
    renamed = [Item(f"elsewhere/{number}", item.text, item.image) for number, item in enumerate(sample_items())]
    encoded = []
    searcher.model.encode_text = lambda texts, *_: encoded.append(texts)
    searcher.model.encode_image = lambda images, *_: encoded.append(images)
    again = searcher.add([*renamed, *renamed])
    assert (again.new, again.known, again.duplicates, encoded) == (0, 128, 128, [])


def test_broken_images_are_named_and_the_rest_is_kept(new, tmp_path):
    good = photo(300, 200)
    good.save(tmp_path / "good.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "good.jpg").read_bytes()[:-300])
    (tmp_path / "text.png").write_text("no image")
    bomb = Image.new("1", (9000, 9000))
    bomb.save(tmp_path / "large.png")
    names = ("good.jpg", "cut.jpg", "text.png", "large.png", "gone.png")
    searcher = new()
    done = searcher.add(Item(name, image=str(tmp_path / name)) for name in names)
    assert done.new == 1
    assert dict(done.skipped) == {
        "cut.jpg": "it is broken", "text.png": "it cannot be read as an image",
        "large.png": "it has 9000 x 9000 pixels, more than 64,000,000",
        "gone.png": "it cannot be read (No such file or directory)",
    }  # fmt: skip
    with pytest.raises(ItemError, match="it does not exist"):
        decode_item(str(tmp_path / "gone.png"), ImagePreparer())


def test_the_table_is_a_data_set(searcher):
    parts = str(searcher.index.folder / "table" / "*.arrow")
    rows = load_dataset("arrow", data_files=parts, split="train", cache_dir=str(searcher.index.folder.parent / "cache"))
    assert rows.column_names == ["key", "kind", "name", "text", "image", "occurrences", "embedding"]
    row = rows[0]
    assert row["image"].size == (224, 224)
    vector = searcher.model.model.encode_text("a red circle on paper")
    assert np.allclose(rows[1]["embedding"], vector, atol=1e-6)


def test_deleted_rows_are_gone_from_the_files(searcher):
    index = searcher.index
    assert any("a pink ring on paper" in part.read_bytes().decode("latin-1") for part in index.table.parts)
    gone = [hit.name for hit in searcher.search("a pink ring on paper", k=1, kinds=["text"])]
    assert index.remove(gone) == 1
    assert not any("a pink ring on paper" in part.read_bytes().decode("latin-1") for part in index.table.parts)
    assert searcher.search("a pink ring on paper", k=1, kinds=["text"])[0].name not in gone
    assert index.remove(["drawings/*"]) == 64
    assert index.counts() == {"image": 0, "text": 63, "caption": 0}
    with pytest.raises(SearchError, match=r"Nothing in .* is called 'drawings/\*'. Use the names that hits show"):
        index.remove(["texts.jsonl:1", "drawings/*"])
    assert len(index) == 63
    assert index.remove(["*"]) == 63
    with pytest.raises(SearchError, match=r"is empty\. Add something with bifocal index"):
        searcher.search("x")
    assert searcher.add(sample_items()).new == 128, "what was deleted may come back"


def test_another_model_is_refused(searcher, processor, tmp_path):
    torch.manual_seed(1)
    other = tmp_path / "other"
    BifocalModel(small_config()).save_pretrained(other)
    processor.save_pretrained(other)
    with pytest.raises(SearchError, match=r"has other weights .* whose vectors cannot be compared. Index again"):
        Searcher(SearchIndex(searcher.index.folder), str(other))
    with pytest.raises(SearchError, match="whose vectors cannot be compared"):
        SearchIndex.create(searcher.index.folder, str(other), weights_hash(other), 40)
    moved = tmp_path / "moved"
    moved.symlink_to(searcher.index.model)
    assert Searcher(SearchIndex(searcher.index.folder), str(moved)).search("a star")


def test_bad_options_are_named(new, tmp_path, model_folder):
    searcher = new()
    with pytest.raises(SearchError, match=r"choose --dim from 1 to 40, not 41"):
        new([41])
    with pytest.raises(SearchError, match=r"'int4' is not a precision\. Choose one of float32, int8"):
        new([], ["int4"])
    with pytest.raises(SearchError, match=r"'video' cannot be searched for\. Choose one of image, text"):
        searcher.search("x", kinds=["video"])
    searcher.add([Item("x", "x")])
    for wrong in (np.nan, np.inf, 1e30):  # the square of the last one is infinite
        with pytest.raises(SearchError, match="vector of a query is not finite"):
            searcher.index.rank(np.array([[1.0] * 40, [wrong] * 40]), 1)
    with pytest.raises(SearchError, match=r"is not an index\. Make one with bifocal index"):
        SearchIndex(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("x")
    with pytest.raises(SearchError, match="holds other files and no index"):
        SearchIndex.create(tmp_path / "full", str(model_folder), "w", 40)
    with pytest.raises(ModelError, match=r"missing' does not exist\. Give the folder of a model"):
        Searcher(searcher.index, str(tmp_path / "missing"))


KILLED = """
import os, signal, sys
from bifocal.hub.search import index, ingestion, table
from bifocal.hub.search.searcher import Searcher
from tests.hub.search.conftest import sample_items
ingestion.ROWS = 20
searcher = Searcher(index.SearchIndex(sys.argv[1]))
write, left = table.Table._write, [int(sys.argv[2])]
def killing(self, part, rows):
    left[0] -= 1
    if left[0] == 0:
        (self.folder / f".{part.name}.1-2").write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    write(self, part, rows)
table.Table._write = killing
searcher.add(sample_items())
"""


def test_killed_runs_resume(new):
    searcher = new()
    whole = new(name="whole")
    whole.add(sample_items())
    for parts in (3, 2):
        done = run("-c", KILLED, searcher.index.folder, str(parts))
        assert done.returncode == -9, done.stderr[-2000:]
    index = SearchIndex(searcher.index.folder)
    assert len(index) == 60, "two parts of the first run and one of the second"
    added = Searcher(index).add(sample_items())
    assert (added.new, added.known) == (68, 60)
    assert not list(index.table.folder.glob(".*"))
    vector = whole.vector("a brown diamond")
    for kind in ("image", "text"):
        here, there = ({hit.name: hit.score for hit in one.search(vector, 64, [kind])} for one in (index, whole.index))
        assert here == pytest.approx(there, abs=1e-5)


def test_an_interrupted_update_resumes(new, monkeypatch):
    monkeypatch.setattr("bifocal.hub.search.ingestion.ROWS", 20)
    searcher = new()
    searcher.add(sample_items(), source=ItemSource({"paths": ["shapes"]}))
    changed = [Item(f"new/{item.name}", item.text and f"{item.text}!", item.image) for item in sample_items()]
    changed = [item for item in changed if item.kind == "image"] + [
        item for item in sample_items() if item.kind == "text"
    ]
    write, left = Table._write, [3]

    def interrupted(self, part, rows):
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        write(self, part, rows)

    monkeypatch.setattr(Table, "_write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        searcher.add(changed, source=ItemSource({"paths": ["shapes"]}))
    monkeypatch.setattr(Table, "_write", write)
    done = Searcher(SearchIndex(searcher.index.folder)).add(changed, source=ItemSource({"paths": ["shapes"]}))
    assert (done.new, done.known, done.missing) == (0, 128, 0)
    assert 0 < done.renamed < 64, "the rest was done before the interruption"
    rows = SearchIndex(searcher.index.folder).snapshot().rows.to_pylist()
    assert sorted(row["name"] for row in rows) == sorted(item.name for item in changed)
    assert all(row["text"].endswith("!") for row in rows if row["kind"] == "image")


def test_two_that_add_at_once(searcher, new, monkeypatch):
    monkeypatch.setattr("bifocal.hub.search.ingestion.ROWS", 10)
    index = new(name="shared").index
    threads = [
        threading.Thread(target=lambda: Searcher(SearchIndex(index.folder)).add(sample_items())) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    keys = SearchIndex(index.folder).table.open().rows["key"].to_pylist()
    assert len(keys) == len(set(keys)) == 128
    assert index.counts() == {"image": 64, "text": 64, "caption": 0}, "an open index sees what others added"


def test_an_index_that_another_fills_meanwhile_is_not_emptied(new, model_folder, monkeypatch):
    """What `create` saw before it waited is looked at again under the lock."""
    searcher = new(name="shared")
    folder, lock = searcher.index.folder, index_module.index_lock

    def late(folder):
        monkeypatch.setattr(index_module, "index_lock", lock)
        searcher.add(sample_items()[:4])
        return lock(folder)

    monkeypatch.setattr(index_module, "index_lock", late)
    with pytest.raises(SearchError, match="whose vectors cannot be compared"):
        SearchIndex.create(folder, "other", "other weights", 40)
    assert sum(SearchIndex(folder).counts().values()) == 4
    empty = new(name="empty")
    SearchIndex.create(empty.index.folder, "other", "other weights", 40)
    with pytest.raises(SearchError, match="whose vectors cannot be compared"):
        empty.add(sample_items()[:4])  # the index was bound to another model since


def test_who_waits_for_an_index_that_is_discarded_makes_its_own(new, monkeypatch):
    index, other = new(name="shared").index, new(name="shared")
    waiting = threading.Thread(target=lambda: other.add(sample_items()[:4]))
    has_rows = SearchIndex.has_rows

    def while_locked(index):
        monkeypatch.setattr(SearchIndex, "has_rows", has_rows)
        waiting.start()
        time.sleep(0.2)  # by then it waits for the lock; if not, it finds the folder gone
        return has_rows(index)

    monkeypatch.setattr(SearchIndex, "has_rows", while_locked)
    index.discard_if_empty()
    waiting.join()
    assert sum(SearchIndex(index.folder).counts().values()) == 4
    third = new(name="third").index
    third.discard_if_empty()
    assert not third.folder.exists()
    assert Searcher(third).add(sample_items()[:4]).new == 4
    assert sum(SearchIndex(third.folder).counts().values()) == 4
