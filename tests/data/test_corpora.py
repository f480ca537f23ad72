"""The registry of public corpora."""

import re

import pytest

from bifocal.data.corpora import NUMBERED, corpora, corpus, explained, listing
from bifocal.data.kinds import COLUMNS
from bifocal.data.loading import infer_kind, load_source
from bifocal.data.locate import is_files
from bifocal.data.source import Source
from bifocal.errors import DataError

FORMATS = {"webdataset", "sharegpt4v", "dpr"}  # which know the columns


def test_there_are_enough_of_each_kind():
    kinds = [entry.kind for entry in corpora().values()]
    assert kinds.count("text-pair") >= 40
    assert kinds.count("text-triplet") >= 20
    assert kinds.count("image-text") >= 10
    assert any("mul" in entry.languages for entry in corpora().values() if entry.kind == "text-pair")


@pytest.mark.parametrize("name", corpora())
def test_every_entry_is_complete(name):
    entry = corpora()[name]
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name)
    assert not is_files(name), "it could not be told from a file"
    assert entry.dataset_id is None or re.fullmatch(r"[\w.-]+/[\w.-]+", entry.dataset_id)
    assert entry.dataset_id or entry.download, "it comes from somewhere"
    assert entry.description.endswith(".")
    assert entry.source
    assert entry.languages
    assert all(re.fullmatch("[a-z]{2,3}", language) for language in entry.languages)
    assert (entry.num_rows is None) <= (entry.download is not None or "rows" in entry.unconfirmed)
    if entry.download is None:
        assert entry.format in FORMATS or list(entry.columns) == [*COLUMNS.get(entry.kind, ("text",))]
        source = entry.to_source(Source(path=f"corpus:{name}"))
        kept = {theirs: ours for ours, theirs in entry.columns.items() if theirs != NUMBERED}
        assert source.column_mapping == kept


def test_the_listing_and_the_facts_of_one():
    table = listing().splitlines()
    assert all(any(line.startswith(f"{name} ") for line in table) for name in corpora())
    assert "\n  columns     query: anchor, positive: positive, negatives: negative\n" in explained("all-nli-triplets")
    assert "\n  rows        about 128,542\n" in explained("wikihow"), "those of another copy"
    assert "To download: img2dataset" in explained("laion-400m")
    assert "log in" in explained("laion-400m")
    assert "mlm:" in explained("c4")


def test_a_recipe_names_one():
    source = corpus("all-nli").to_source(Source(path="corpus:all-nli", split="dev", limit=5))
    assert (source.path, source.name, source.split, source.limit) == ("sentence-transformers/all-nli", "pair", "dev", 5)
    assert source.column_mapping == {"anchor": "query", "positive": "positive"}
    shards = corpus("cc3m").to_source(Source(path="corpus:cc3m", streaming=True))
    assert shards.path.startswith("hf://")
    assert shards.streaming
    assert corpus("nomic-pairs-s2orc-abstract-body").split == "s2orc_abstract_body"
    assert corpus("msmarco-distilbert-mnrl-50").to_source(Source(path="corpus:x")).num_negatives == 7
    assert infer_kind(Source(path="corpus:e5r-nq")) == "text-triplet"


def test_licences_are_told_apart():
    assert not corpus("gooaq").licence_known
    assert not corpus("all-nli").licence_known
    assert corpus("amazon-qa-sets").licence_known
    commercial = {name for name, entry in corpora().items() if not entry.non_commercial}
    assert {"cc3m", "c4", "gooaq"} <= commercial
    assert not {"sharegpt4v", "natural-questions-dpr", "msmarco-bm25-one"} & commercial


def test_unknown_ones_and_those_to_fetch():
    with pytest.raises(DataError, match=r"There is no corpus 'all-nil'; did you mean 'all-nli'\?"):
        corpus("all-nil")
    with pytest.raises(DataError, match="There is no corpus 'nomic-pairs'; it is several, such as 'nomic-pairs-"):
        corpus("nomic-pairs")
    with pytest.raises(DataError, match="'corpus:laion-400m' must be downloaded first: img2dataset"):
        load_source(Source(path="corpus:laion-400m"), "image-text")
