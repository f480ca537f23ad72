"""The registry of public corpora."""

import pytest

from bifocal.data.corpora import corpora, corpus, explained, listing
from bifocal.data.loading import load_source
from bifocal.data.source import Source
from bifocal.errors import DataError


def test_every_entry_is_complete_and_printed():
    table = listing().splitlines()
    assert len(table) == len(corpora()) + 1 > 10
    for name, found in corpora().items():
        assert all((found.licence, found.num_rows, found.verified))
        assert found.dataset_id or found.download, "it comes from somewhere"
        assert any(line.startswith(name) for line in table)
        text = explained(name)
        assert found.licence in text
        assert ("To download" in text) == (found.download is not None)
    kinds = {found.kind for found in corpora().values()}
    assert kinds == {"image-text", "text-pair", "text-triplet", "text-only"}


def test_a_recipe_names_one():
    made = corpus("all-nli").source(Source(path="corpus:all-nli", split="dev", limit=5))
    assert (made.path, made.name, made.split, made.limit) == ("sentence-transformers/all-nli", "pair", "dev", 5)
    assert made.column_mapping == {"anchor": "query"}
    shards = corpus("cc3m").source(Source(path="corpus:cc3m", streaming=True))
    assert shards.path.startswith("hf://")
    assert shards.streaming


def test_unknown_ones_and_those_to_fetch():
    with pytest.raises(DataError, match=r"There is no corpus 'all-nil'; did you mean 'all-nli'\?"):
        corpus("all-nil")
    with pytest.raises(DataError, match="'corpus:laion-400m' must be downloaded first: img2dataset"):
        load_source(Source(path="corpus:laion-400m"), "image-text")
