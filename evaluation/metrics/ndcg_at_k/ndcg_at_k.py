# Copyright 2026 The Bifocal authors. Licensed under the Apache License, Version 2.0.
"""Normalised discounted cumulative gain of the first k, as a metric for the `evaluate` library."""

import math

import datasets
import evaluate

_DESCRIPTION = """
Normalised discounted cumulative gain: a right item at rank r gains its grade divided by log2(r + 1), and the sum over
the first k is divided by that of the best possible ranking. With k = 10 it is the main metric of text retrieval in BEIR
and MTEB.
"""
_INPUTS = """
Args:
    predictions: ranked ids of each query, best first.
    references: ids of the right items of each query.
    grades: grades of the right items of each query; 1 if None.
    k: number of first items that count.

Returns:
    ndcg_at_k: mean over the queries.
"""


class NdcgAtK(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        ids = datasets.List(datasets.Value("string"))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": ids, "references": ids}),
            reference_urls=["https://arxiv.org/abs/2104.08663"],
        )

    def _compute(
        self, predictions: list[list[str]], references: list[list[str]], grades: list[list[float]] | None = None,
        k: int = 10,
    ) -> dict[str, float]:  # fmt: skip
        if k < 1:
            raise ValueError(f"k must be at least 1, but it is {k}.")
        total = 0.0
        for number, (ranking, right) in enumerate(zip(predictions, references, strict=True)):
            gains = dict(zip(right, grades[number] if grades else [1.0] * len(right), strict=True))
            ideal = sum(g / math.log2(r + 2) for r, g in enumerate(sorted(gains.values(), reverse=True)[:k]))
            if not ideal:
                raise ValueError(f"Query {number} has no right item; remove it.")
            first = list(dict.fromkeys(ranking))[:k]
            total += sum(gains.get(item, 0.0) / math.log2(r + 2) for r, item in enumerate(first)) / ideal
        return {"ndcg_at_k": total / len(references)}
