"""The same items in a real LanceDB database: the same hits with the same scores."""

import json

import numpy as np
import pytest

from bifocal.embedding.items import normalize
from bifocal.hub.search import lance
from bifocal.hub.search.hits import SearchError
from bifocal.hub.search.lance import export_to_lancedb, search_lancedb
from bifocal.hub.search.table import Occurrence
from tests.bifocal.commands import error_of, invoke


@pytest.mark.parametrize("kinds", [["image"], ["text"], ["image", "text"]])
def test_a_database_gives_the_same_hits(searcher, tmp_path, kinds):
    uri = str(tmp_path / "lance")
    assert export_to_lancedb(searcher.index, uri) == 128
    vector = searcher.vector("a purple square")
    expected = searcher.index.search(vector, 20, kinds)
    hits = search_lancedb(uri, vector, searcher.index.weights, 20, kinds)
    assert [hit.names for hit in hits] == [hit.names for hit in expected]
    for name in ("score", "ranking_score"):
        assert [getattr(hit, name) for hit in hits] == pytest.approx([getattr(hit, name) for hit in expected], abs=1e-5)
    assert [hit.thumbnail for hit in hits] == [hit.thumbnail for hit in expected]


def test_the_command_ranks_a_database_as_the_index(searcher, tmp_path):
    folder = str(searcher.index.folder)
    exported = invoke(tmp_path, "export-lancedb", folder, "lance")
    assert exported.exit_code == 0, exported.stderr
    assert exported.stdout == "128 rows are in lance.\n"
    query = ("search", folder, "a black star on paper", "-k", "15", "--json")
    expected = json.loads(invoke(tmp_path, *query).stdout)
    hits = json.loads(invoke(tmp_path, *query, "--lancedb", "lance").stdout)
    assert {hit["kind"] for hit in expected} == {"image", "text"}
    assert len(hits) == 15
    for hit, other in zip(hits, expected, strict=True):
        assert hit == {**other, "score": pytest.approx(other["score"], abs=1e-5),
                       "ranking_score": pytest.approx(other["ranking_score"], abs=1e-5)}  # fmt: skip
    refused = error_of(tmp_path, *query, "--lancedb", "lance", "--dim", "16")
    assert "--dim and --precision choose a variant of the index" in refused


def test_an_approximate_search_gives_exact_scores(new, tmp_path, monkeypatch):
    index = new().index
    vectors = normalize(np.random.default_rng(0).normal(size=(600, 40)).astype(np.float32))
    index.table.append(
        [{"key": f"{row:04x}", "kind": ("image", "text")[row % 2], "text": f"text {row}", "image": None,
          "occurrences": [Occurrence(-1, f"{row}", "")], "embedding": vector} for row, vector in enumerate(vectors)]
    )  # fmt: skip
    monkeypatch.setattr(lance, "_MIN_ROWS_FOR_ANN", 500)
    uri = str(tmp_path / "lance")
    export_to_lancedb(index, uri)
    assert lance._connect(uri).open_table("items").list_indices()
    hits = search_lancedb(uri, vectors[7], index.weights, 20)
    expected = index.search(vectors[7], 20)
    assert len(hits) == 20
    assert len({hit.name for hit in hits} & {hit.name for hit in expected}) >= 15
    assert [hit.score for hit in hits] == pytest.approx([vectors[int(hit.name)] @ vectors[7] for hit in hits], abs=1e-5)


def test_a_second_export_follows_the_index(searcher, tmp_path):
    uri = str(tmp_path / "lance")
    export_to_lancedb(searcher.index, uri)
    searcher.index.remove(["drawings/*"])
    assert export_to_lancedb(searcher.index, uri) == 64
    vector = searcher.vector("a star")
    assert search_lancedb(uri, vector, searcher.index.weights, 5, ["image"]) == []
    expected = [hit.name for hit in searcher.index.search(vector, 5)]
    assert [hit.name for hit in search_lancedb(uri, vector, searcher.index.weights, 5)] == expected


def test_a_database_of_other_weights_is_refused(searcher, new, tmp_path):
    uri = str(tmp_path / "lance")
    with pytest.raises(SearchError, match="There is no table 'items' at"):
        search_lancedb(uri, searcher.vector("a star"), searcher.index.weights)
    export_to_lancedb(searcher.index, uri)
    with pytest.raises(SearchError, match="are of other weights"):
        search_lancedb(uri, searcher.vector("a star"), "0123")
    with pytest.raises(SearchError, match="is empty"):
        export_to_lancedb(new(name="empty").index, uri)
