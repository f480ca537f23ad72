"""The folders that `evaluate.load` reads: numbers against scikit-learn and our own, without network."""

from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import ndcg_score

from bifocal.evaluation.retrieval import recall_at, recall_mteb_at, relevant_ranks

evaluate = pytest.importorskip("evaluate")
METRICS = Path(__file__).parents[2] / "evaluation" / "metrics"


@pytest.fixture
def load(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_EVALUATE_OFFLINE", "1")
    return lambda name: evaluate.load(str(METRICS / name), cache_dir=str(tmp_path))


def ranked(seed: int = 0):
    generator = np.random.default_rng(seed)
    scores = generator.normal(size=(20, 30))
    relevant = [generator.choice(30, generator.integers(1, 5), replace=False).tolist() for _ in range(20)]
    found = [[str(n) for n in np.argsort(-row)] for row in scores]
    return scores, relevant, found, [[str(n) for n in numbers] for numbers in relevant]


@pytest.mark.parametrize("k", [1, 5, 10])
def test_recall(load, k):
    scores, relevant, found, right = ranked()
    ranks = relevant_ranks(scores, np.eye(30), relevant)
    metric = load("recall_at_k")
    for definition, ours in (("any", recall_at), ("share", recall_mteb_at)):
        value = metric.compute(predictions=found, references=right, k=k, definition=definition)["recall_at_k"]
        assert value == pytest.approx(ours(ranks, k), abs=1e-12)


@pytest.mark.parametrize("k", [1, 5, 10])
def test_ndcg(load, k):
    scores, relevant, found, right = ranked(1)
    truth = np.zeros(scores.shape)
    grades = [[float(1 + n % 3) for n in numbers] for numbers in relevant]
    for row, numbers in enumerate(relevant):
        truth[row, numbers] = grades[row]
    value = load("ndcg_at_k").compute(predictions=found, references=right, grades=grades, k=k)["ndcg_at_k"]
    assert value == pytest.approx(ndcg_score(truth, scores, k=k), abs=1e-9)


def test_bad_input(load):
    with pytest.raises(ValueError, match="Query 0 has no right item"):
        load("recall_at_k").compute(predictions=[["a"]], references=[[]])
    with pytest.raises(ValueError, match="'all' is not a definition of recall"):
        load("recall_at_k").compute(predictions=[["a"]], references=[["a"]], definition="all")
