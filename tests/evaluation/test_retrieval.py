"""Ranks and metrics against cases worked out by hand, scikit-learn, and a plain loop; memory; bad input."""

import tracemalloc

import numpy as np
import pytest
from sklearn.metrics import ndcg_score

from bifocal.errors import EvaluationError
from bifocal.evaluation.retrieval import (
    ndcg_at,
    recall_at,
    recall_mteb_at,
    relevant_ranks,
    retrieval_metrics,
    target_ranks,
)


def test_one_right_item_by_hand():
    items = np.eye(3)
    queries = np.array([[1.0, 0.0, 0.0], [0.9, 0.4, 0.1], [0.5, 0.4, 0.3]])
    ranks = target_ranks(queries, items)
    assert ranks.tolist() == [1, 2, 3]
    assert [recall_at(ranks, k) for k in (1, 2, 3)] == [pytest.approx(n / 3) for n in (1, 2, 3)]
    assert retrieval_metrics(ranks, ks=(1, 2), items=3) == {
        "recall@1": pytest.approx(1 / 3), "recall@2": pytest.approx(2 / 3), "mrr": pytest.approx(11 / 18),
        "ndcg@1": pytest.approx(1 / 3), "ndcg@2": pytest.approx((1 + 1 / np.log2(3)) / 3),
    }  # fmt: skip


def test_several_right_items_by_hand():
    """An image with three captions, found at ranks 1, 3 and 6, and one with a single caption at rank 4."""
    scores = np.array([[0.9, 0.8, 0.7, 0.6, 0.5, 0.4], [0.9, 0.8, 0.7, 0.6, 0.5, 0.4]])
    ranks = relevant_ranks(scores, np.eye(6), [[5, 0, 2], [3]])
    assert ranks.tolist() == [[1, 3, 6], [4, 0, 0]]
    assert recall_at(ranks, 1) == 0.5, "CLIP-benchmark: any caption"
    assert recall_mteb_at(ranks, 1) == pytest.approx((1 / 3 + 0) / 2), "mteb: of three captions one"
    assert recall_at(ranks, 5) == 1.0
    assert recall_mteb_at(ranks, 5) == pytest.approx((2 / 3 + 1) / 2)
    ideal = 1 + 1 / np.log2(3) + 1 / 2
    assert ndcg_at(ranks, 5) == pytest.approx(((1 + 1 / 2) / ideal + 1 / np.log2(5)) / 2)
    found = retrieval_metrics(ranks, ks=(1, 5))
    assert found["mrr"] == pytest.approx((1 + 1 / 4) / 2)
    assert found["recall_mteb@1"] == recall_mteb_at(ranks, 1)


def test_ties_do_not_flatter():
    same = np.ones((4, 2)) / np.sqrt(2)
    assert target_ranks(same, same).tolist() == [4, 4, 4, 4]
    assert relevant_ranks(same[:1], same, [[0, 2]]).tolist() == [[3, 4]], "wrong ones first"


def test_against_sorting():
    generator = np.random.default_rng(0)
    queries, items = generator.normal(size=(40, 8)), generator.normal(size=(25, 8))
    targets = generator.integers(0, 25, size=40)
    expected = []
    for query, target in zip(queries, targets, strict=True):
        order = sorted(range(25), key=lambda item: -float(items[item] @ query))
        expected.append(order.index(target) + 1)
    assert target_ranks(queries, items, targets).tolist() == expected


@pytest.mark.parametrize("seed", range(5))
def test_against_independent_implementations(seed, monkeypatch):
    """scikit-learn's nDCG, mteb's own evaluator, and recall by sorting; in blocks that do not divide the queries."""
    pytest.importorskip("mteb")
    from mteb._evaluators.retrieval_metrics import calculate_retrieval_scores

    generator = np.random.default_rng(seed)
    queries, items = generator.normal(size=(37, 16)), generator.normal(size=(90, 16))
    relevant = [generator.choice(90, generator.integers(1, 7), replace=False).tolist() for _ in range(37)]
    monkeypatch.setattr("bifocal.evaluation.retrieval._BLOCK_BYTES", 4 * 90 * 10)
    ranks = relevant_ranks(queries, items, relevant)
    found = retrieval_metrics(ranks, (1, 5, 10, 20), 90)
    truth = np.zeros((37, 90))
    for row, numbers in enumerate(relevant):
        truth[row, numbers] = 1
    scores = queries @ items.T
    order = np.argsort(-scores, axis=1)
    for k in (1, 5, 10, 20):
        hits = np.take_along_axis(truth, order[:, :k], axis=1)
        assert found[f"ndcg@{k}"] == pytest.approx(ndcg_score(truth, scores, k=k), abs=1e-9)
        assert found[f"recall@{k}"] == pytest.approx((hits.sum(1) > 0).mean(), abs=1e-9)
        assert found[f"recall_mteb@{k}"] == pytest.approx((hits.sum(1) / truth.sum(1)).mean(), abs=1e-9)
    results = {f"q{r}": {f"d{c}": float(s) for c, s in enumerate(row)} for r, row in enumerate(scores)}
    qrels = {f"q{r}": {f"d{c}": 1 for c in numbers} for r, numbers in enumerate(relevant)}
    theirs = calculate_retrieval_scores(results, qrels, [1, 5, 10, 20])
    for k in (1, 5, 10, 20):
        assert found[f"ndcg@{k}"] == pytest.approx(theirs.ndcg[f"NDCG@{k}"], abs=1e-5), "theirs is rounded"
        assert found[f"recall_mteb@{k}"] == pytest.approx(theirs.recall[f"Recall@{k}"], abs=1e-5)
    assert found["mrr"] == pytest.approx((1 / ranks[:, 0]).mean(), abs=1e-9)


def test_the_matrix_is_never_held():
    """5,000 images and 25,000 captions in 768 dimensions: below 1 GiB, inputs included."""
    generator = np.random.default_rng(0)
    images = generator.standard_normal((5000, 768), dtype=np.float32)
    tracemalloc.start()
    texts = np.repeat(images, 5, axis=0) + generator.standard_normal((25_000, 768), dtype=np.float32)
    ranks = relevant_ranks(images, texts, np.arange(25_000).reshape(5000, 5).tolist())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert recall_at(ranks, 1) == 1.0
    assert peak + images.nbytes < 2**30, peak


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(queries=np.full((2, 3), np.nan)), r"2 of 2 queries have embeddings that are not finite, first number 0"),
        (dict(items=np.array([[1, 0, 0], [0, np.inf, 0]])), r"1 of 2 items have .* first number 1"),
        (dict(items=np.ones((2, 4))), "Queries have 3 dimensions and items 4; embed both with one model"),
        (dict(relevant=[[0], []]), "Query 1 has no right item"),
        (dict(relevant=[[0], [2]]), r"Query 1 names the right items \[2\], but there are 2"),
        (dict(relevant=[[0], [1, 1]]), "each may be named once"),
        (dict(relevant=[[0]]), "There are 2 queries, but right items for 1"),
        (dict(items=np.empty((0, 3))), "The items have shape"),
    ],
)
def test_bad_input(change, message):
    given = {"queries": np.ones((2, 3)), "items": np.ones((2, 3)), "relevant": [[0], [1]], **change}
    with pytest.raises(EvaluationError, match=message):
        relevant_ranks(**given)


def test_k_beyond_the_corpus():
    with pytest.raises(EvaluationError, match="k=5 is impossible with 3 items"):
        retrieval_metrics(np.array([1, 2]), (1, 5), 3)


def test_the_first_right_items_are_enough():
    """Where many items are right, metrics of the first k are those of all ranks, which need not be held."""
    generator = np.random.default_rng(0)
    queries, items = generator.normal(size=(50, 8)), generator.normal(size=(400, 8))
    relevant = [generator.choice(400, number, replace=False).tolist() for number in (1, 2, 30, 399, 400) * 10]
    whole = relevant_ranks(queries, items, relevant)
    short = relevant_ranks(queries, items, relevant, first=10)
    assert short.shape == (50, 10)
    np.testing.assert_array_equal(short, whole[:, :10])
    counts = np.array([len(numbers) for numbers in relevant])
    assert retrieval_metrics(short, (1, 5, 10), 400, counts) == retrieval_metrics(whole, (1, 5, 10), 400)
    only = retrieval_metrics(short[:, :1], (1,), 400, counts)
    assert only == retrieval_metrics(whole, (1,), 400)
