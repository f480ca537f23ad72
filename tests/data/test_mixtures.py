"""Mixtures of corpora with sampling weights."""

import pytest
from pydantic import ValidationError

from bifocal.data.corpora import corpora
from bifocal.data.mixtures import Member, Mixture, mixture_table, shares, shipped_mixture, shipped_mixtures
from bifocal.errors import DataError
from bifocal.training.recipe import find_recipe, load_recipe
from bifocal.training.shipped_recipes import shipped_recipes


@pytest.mark.parametrize("name", shipped_mixtures())
def test_every_corpus_of_a_mixture_exists_and_can_be_drawn(name):
    shipped = shipped_mixture(name)
    members = Mixture(name=name).members(shipped.kind)
    assert [member.name for member in members] == list(shipped.weights)
    assert sum(shares(members)) == pytest.approx(1)
    assert name not in corpora()
    assert name not in shipped_recipes()
    for member in members:
        assert member.corpus.download is None
        assert member.weight == pytest.approx((1e6 / member.corpus.num_rows) ** 0.25, rel=0.05), "the rule of the file"


def test_every_corpus_of_the_shipped_recipes_exists():
    for name in shipped_recipes():
        recipe = load_recipe(find_recipe(name), training_values=False)
        sources = [part.data for task in [*recipe.tasks, *recipe.eval_tasks] for part in task.expanded()]
        sources += [recipe.mlm.data] if recipe.mlm else []
        names = [source.path.removeprefix("corpus:") for source in sources if source.title.startswith("corpus:")]
        assert set(names) <= set(corpora())
        batches = {part.batch_size for task in recipe.tasks for part in task.expanded() if task.mixture}
        if name in ("stage1", "stage2"):
            assert len(names) > 30
            assert all(corpora()[corpus].num_rows >= max(batches) for corpus in names), "a batch from one of them"


def test_shares_are_rows_times_weight():
    entries = corpora()
    members = [Member("squad", entries["squad"], 2.0), Member("gooaq", entries["gooaq"], 0.5)]
    drawn = [87_599 * 2.0, 3_012_496 * 0.5]
    assert shares(members) == pytest.approx([part / sum(drawn) for part in drawn])
    limited = [Member("squad", entries["squad"], 1.0, 1000), Member("gooaq", entries["gooaq"], 3.0, 1000)]
    assert shares(limited) == pytest.approx([0.25, 0.75])
    table = mixture_table(limited, rows_drawn=8000).splitlines()
    assert table[0].split() == ["corpus", "kind", "rows", "weight", "share", "licence", "languages", "passes"]
    assert table[1].split()[:5] == ["squad", "text-pair", "1,000", "1", "25.00%"]
    assert table[1].split()[-1] == "2.0", "8,000 rows, a quarter of them of 1,000"
    assert table[3].split() == ["2", "corpora", "2,000", "100.00%"]


def test_own_weights_change_a_mixture():
    mixture = Mixture(name="text-pairs", weights={"squad": 0, "gooaq": 2.5})
    weights = {member.name: member.weight for member in mixture.members("text-pair")}
    assert "squad" not in weights
    assert weights["gooaq"] == 2.5
    assert weights["eli5"] == shipped_mixture("text-pairs").weights["eli5"]


def test_warnings_name_the_corpora():
    lines = mixture_table(Mixture(weights={"xsum": 1, "msmarco-bm25-one": 1, "amazon-qa-sets": 1}).members("text-pair"))
    assert lines.splitlines()[-3:] == [
        "Not for commercial use (1): msmarco-bm25-one.",
        "No licence stated or seen, read their cards (1): xsum.",
        "Rows rounded or not confirmed, and with them their shares (1): xsum.",
    ]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"weights": {"gooqa": 1}}, r"weights: there is no corpus 'gooqa'; did you mean 'gooaq'\?"),
        ({"weights": {"laion-400m": 1}}, "weights: 'laion-400m' must be downloaded first; give it a task of its own"),
        ({"weights": {"codefeedback": 1}}, "weights: the rows of 'codefeedback' are not known, so it has no share"),
        ({"weights": {"gooaq": 0}}, "a mixture needs name, or weights of which one is above 0"),
        ({"weights": {"gooaq": -1}}, "greater than or equal to 0"),
        ({"name": "text-pair"}, r"there is no mixture 'text-pair'; did you mean 'text-pairs'\?"),
        ({}, "a mixture needs name, or weights"),
    ],
)
def test_what_is_wrong_names_the_corpus_and_the_field(values, message):
    with pytest.raises(ValidationError, match=message):
        Mixture(**values)


def test_kinds_must_fit():
    assert len(Mixture(weights={"e5r-nq": 1}).members("text-pair")) == 1, "query and positive of triplets are pairs"
    with pytest.raises(DataError, match="mixture: 'gooaq' holds text-pair rows, but the task reads text-triplet"):
        Mixture(weights={"gooaq": 1}).members("text-triplet")
