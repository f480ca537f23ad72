"""The same vectors in a real LanceDB database."""

import pytest

from bifocal.hub.search.items import SearchError
from bifocal.hub.search.lance import copy_to_lance, search_lance


def test_a_copy_finds_the_same(searcher, tmp_path):
    uri = str(tmp_path / "lance")
    assert copy_to_lance(searcher.index, uri) == 128
    vector = searcher.vector("a purple square")
    for kind in ("image", "text"):
        here = searcher.index.search(vector, 10, [kind])
        there = search_lance(uri, vector, searcher.index.weights, 10, [kind])
        assert [hit.name for hit in here] == [hit.name for hit in there]
        assert [hit.score for hit in here] == pytest.approx([hit.score for hit in there], abs=1e-5)
        assert [hit.thumbnail for hit in here] == [hit.thumbnail for hit in there]


def test_a_second_copy_follows_the_index(searcher, tmp_path):
    uri = str(tmp_path / "lance")
    copy_to_lance(searcher.index, uri)
    searcher.index.remove(["drawings/*"])
    assert copy_to_lance(searcher.index, uri) == 64
    assert search_lance(uri, searcher.vector("a star"), searcher.index.weights, 5, ["image"]) == []


def test_what_does_not_fit_is_refused(searcher, new, tmp_path):
    uri = str(tmp_path / "lance")
    with pytest.raises(SearchError, match="There is no table 'items' at"):
        search_lance(uri, searcher.vector("a star"), searcher.index.weights)
    copy_to_lance(searcher.index, uri)
    with pytest.raises(SearchError, match="were made by other weights"):
        search_lance(uri, searcher.vector("a star"), "0123")
    with pytest.raises(SearchError, match="is empty"):
        copy_to_lance(new(name="empty").index, uri)
