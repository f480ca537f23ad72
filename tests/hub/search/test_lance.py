"""The same items in a real LanceDB database: the same hits with the same scores, by export or embedded into it."""

import json
import re

import numpy as np
import pytest

from bifocal.embedding.items import Item
from bifocal.hub.lance.export import export_to_lancedb
from bifocal.hub.lance.search import LanceIndex
from bifocal.hub.search.captions import caption_name
from bifocal.hub.search.hits import SearchError
from bifocal.hub.search.page import instructions, search_function
from bifocal.hub.search.searcher import Searcher
from bifocal.hub.search.table import Occurrence
from tests.bifocal.commands import error_of, invoke


def same_hits(hits, expected):
    assert [hit.names for hit in hits] == [hit.names for hit in expected]
    for name in ("name", "kind", "text", "thumbnail", "caption"):
        assert [getattr(hit, name) for hit in hits] == [getattr(hit, name) for hit in expected]
    assert [hit.score for hit in hits] == pytest.approx([hit.score for hit in expected], abs=1e-5)
    # In standard deviations, which are small.
    assert [hit.ranking_score for hit in hits] == pytest.approx([hit.ranking_score for hit in expected], abs=1e-3)


@pytest.mark.parametrize("kinds", [["image"], ["text"], ["image", "text"]])
def test_a_database_gives_the_same_hits(searcher, tmp_path, kinds):
    uri = str(tmp_path / "lance")
    result = export_to_lancedb(searcher.index, uri)
    assert (result.written, result.unchanged, result.deleted) == (1, 0, 0)
    database = Searcher(LanceIndex(uri), searcher.model)
    assert database.index.counts() == searcher.index.counts()
    query = dict(text="a purple square", k=20, kinds=kinds)
    same_hits(database.search(**query), searcher.search(**query))
    assert search_function(database)("a star", None, "Two rankings", 5, 0.5) == search_function(searcher)(
        "a star", None, "Two rankings", 5, 0.5
    )


def test_captions_belong_to_their_images(new, tmp_path):
    from tests.hub.search.conftest import sample_items

    searcher = new()
    items = []
    for item in sample_items()[:60]:
        items.append(item)
        if item.kind == "image":  # some captions are texts of their own, too
            items.append(Item(caption_name(item.name), item.text))
            items += [Item(f"also {item.name}", item.text)] if item.name.endswith("4.png") else []
    searcher.add(items)
    uri = str(tmp_path / "lance")
    export_to_lancedb(searcher.index, uri)
    database = Searcher(LanceIndex(uri), searcher.model)
    assert searcher.index.counts()["caption"] > 0
    assert database.index.counts() == searcher.index.counts()
    for kinds in (["image"], ["text"], ["image", "text"]):
        for text in ("a red circle", items[0].text):
            query = dict(text=text, k=12, kinds=kinds)
            same_hits(database.search(**query), searcher.search(**query))


def test_the_commands_search_a_database_as_the_index(searcher, tmp_path):
    folder = str(searcher.index.folder)
    exported = invoke(tmp_path, "export-lancedb", folder, "lance")
    assert exported.exit_code == 0, exported.stderr
    assert re.fullmatch(r"1 parts written, 0 unchanged, 0 deleted; 128 rows, .* in lance\.\n", exported.stdout)
    query = ("a black star on paper", "-k", "15", "--json")
    expected = json.loads(invoke(tmp_path, "search", folder, *query).stdout)
    hits = json.loads(invoke(tmp_path, "search", *query, "--database", "lance").stdout)
    assert {hit["kind"] for hit in expected} == {"image", "text"}
    assert len(hits) == 15
    for hit, other in zip(hits, expected, strict=True):
        assert hit == {**other, "score": pytest.approx(other["score"], abs=1e-5),
                       "ranking_score": pytest.approx(other["ranking_score"], abs=1e-3)}  # fmt: skip
    words = invoke(tmp_path, "search", "17", "-k", "3", "--database", "lance", "--hybrid", "--where", "is_text")
    assert "texts.jsonl:17 " in words.stdout
    assert words.stderr.endswith("Searching lance by vectors and words, only where is_text.\n")
    for command, message in (
        (("search", folder, "star", "--database", "lance"), "Search either an index or a database"),
        (("search", "star", "--database", "lance", "--dim", "16"), "choose a form of an index. Omit them."),
        (("search", folder, "star", "--hybrid"), "--where and --hybrid search a database. Pass --database, too."),
        (("search", "star", "--database", "lance", "--where", "size > 3"), "The filter 'size > 3' cannot be used"),
        (("serve", "--database", "lance", "--space", "space"), "A Space holds its whole index."),
    ):
        assert message in error_of(tmp_path, *command)


def test_a_second_export_writes_what_has_changed(new, tmp_path):
    index = new().index
    for part in range(3):
        index.table.append(
            [{"key": f"{part:02x}{row:02x}", "kind": "text", "text": f"text {part} {row}", "image": None,
              "occurrences": [Occurrence(-1, f"{part}/{row}", "")], "embedding": vector}
             for row, vector in enumerate(_unit_vectors(4, part))]
        )  # fmt: skip
    uri = str(tmp_path / "lance")
    assert export_to_lancedb(index, uri).written == 3
    index.remove(["1/2"])
    result = export_to_lancedb(index, uri)
    assert (result.written, result.unchanged, result.deleted) == (1, 2, 0)
    vector = _unit_vectors(4, 1)[2]
    hits = LanceIndex(uri).rank(vector[None], 20).hits(0)
    assert [hit.name for hit in hits] == [hit.name for hit in index.search(vector, 20)]
    assert "1/2" not in [hit.name for hit in hits]
    assert len(hits) == 11


def _unit_vectors(count: int, seed: int) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=(count, 40)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_visitors_see_neither_the_address_nor_the_filter(searcher, tmp_path):
    uri = str(tmp_path / "lance")
    export_to_lancedb(searcher.index, uri)
    database = LanceIndex(uri, "kind = 'image' OR name != 'secret'", hybrid=True)
    assert database.describe() == f"Searching {uri} by vectors and words, only where {database.where}."
    shown = instructions(Searcher(database, searcher.model))
    assert shown == "Enter a text, an image or both, then press *Search*."


def test_a_database_of_other_weights_is_refused(searcher, new, tmp_path):
    uri = str(tmp_path / "lance")
    export_to_lancedb(searcher.index, uri)
    database = LanceIndex(uri)
    with pytest.raises(SearchError, match="vector of a query is not finite"):
        database.rank(np.full((1, 40), np.nan), 1)
    database.weights = "0123"
    with pytest.raises(SearchError, match="whose vectors cannot be compared"):
        Searcher(database, searcher.model)
    with pytest.raises(SearchError, match="is written by bifocal embed --database"):
        Searcher(LanceIndex(uri), searcher.model).add([])
    with pytest.raises(SearchError, match="is empty"):
        export_to_lancedb(new(name="empty").index, uri)


def test_a_source_is_embedded_into_a_database(searcher, tmp_path):
    (tmp_path / "model").symlink_to(searcher.index.model)
    rows = [{"text": hit.text} for hit in searcher.search("a star", k=8, kinds=["text"])]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ("embed", "texts.jsonl", "lance", "--model", "model", "--database", "--rows-per-part", "3")
    done = invoke(tmp_path, *command)
    assert done.exit_code == 0, done.stderr
    assert done.stdout.startswith("8 embedded, 0 embedded before, 0 skipped; 8 rows, ")
    assert invoke(tmp_path, *command).stdout.startswith("0 embedded, 8 embedded before")
    query = ("search", "a star", "--database", "lance", "--json", "-k", "8")
    hits = json.loads(invoke(tmp_path, *query).stdout)
    expected = {hit.text: hit.score for hit in searcher.search("a star", k=8, kinds=["text"])}
    assert {hit["text"]: hit["score"] for hit in hits} == {
        text: pytest.approx(score, abs=1e-5) for text, score in expected.items()
    }
    assert "holds no vectors in int8" in error_of(tmp_path, *command, "--precision", "int8")
    assert "was written with other settings (dimensions: 40, not 8)" in error_of(tmp_path, *command, "--dim", "8")
