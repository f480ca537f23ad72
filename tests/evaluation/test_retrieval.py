"""Ranks and recalls against cases worked out by hand and a plain loop."""

import numpy as np
import pytest

from bifocal.evaluation.retrieval import recall_at, retrieval_metrics, target_ranks


def test_by_hand():
    items = np.eye(3)
    queries = np.array([[1.0, 0.0, 0.0], [0.9, 0.4, 0.1], [0.5, 0.4, 0.3]])
    ranks = target_ranks(queries, items)
    assert ranks.tolist() == [1, 2, 3]
    assert [recall_at(ranks, k) for k in (1, 2, 3)] == [pytest.approx(n / 3) for n in (1, 2, 3)]
    metrics = retrieval_metrics(ranks, ks=(1, 2))
    assert metrics == {"recall@1": pytest.approx(1 / 3), "recall@2": pytest.approx(2 / 3),
                       "mrr": pytest.approx((1 + 1 / 2 + 1 / 3) / 3)}  # fmt: skip


def test_ties_do_not_flatter():
    same = np.ones((4, 2)) / np.sqrt(2)
    assert target_ranks(same, same).tolist() == [4, 4, 4, 4]


def test_against_sorting():
    generator = np.random.default_rng(0)
    queries, items = generator.normal(size=(40, 8)), generator.normal(size=(25, 8))
    targets = generator.integers(0, 25, size=40)
    expected = []
    for query, target in zip(queries, targets, strict=True):
        order = sorted(range(25), key=lambda item: -float(items[item] @ query))
        expected.append(order.index(target) + 1)
    assert target_ranks(queries, items, targets).tolist() == expected
