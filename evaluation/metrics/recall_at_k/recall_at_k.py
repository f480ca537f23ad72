# Copyright 2026 The Bifocal authors. Licensed under the Apache License, Version 2.0.
"""Recall@k by both definitions in use, as a metric of the `evaluate` library."""

import datasets
import evaluate

_DESCRIPTION = """
Of the first k items that a query finds, how many are right. Where a query has several right items, two definitions are
in use: "any" counts a query as 1 if any of them is among the first k (CLIP-benchmark, published tables of image-text
retrieval), "share" divides those that are by their number (mteb, information retrieval).
"""
_INPUTS = """
Args:
    predictions: for each query the ids of what it found, best first.
    references: for each query the ids of its right items.
    k: how many of the first are looked at.
    definition: "any" or "share".

Returns:
    recall_at_k: the mean over the queries.
"""


class RecallAtK(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        ids = datasets.List(datasets.Value("string"))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": ids, "references": ids}),
            reference_urls=["https://arxiv.org/abs/2405.20204"],
        )

    def _compute(
        self, predictions: list[list[str]], references: list[list[str]], k: int = 10, definition: str = "any"
    ) -> dict[str, float]:
        if definition not in ("any", "share"):
            raise ValueError(f"'{definition}' is no definition of recall; choose 'any' or 'share'.")
        if k < 1:
            raise ValueError(f"k must be at least 1, but it is {k}.")
        total = 0.0
        for number, (found, right) in enumerate(zip(predictions, references, strict=True)):
            if not right:
                raise ValueError(f"Query {number} has no right item; leave it out.")
            hits = len(set(found[:k]) & set(right))
            total += min(hits, 1) if definition == "any" else hits / len(set(right))
        return {"recall_at_k": total / len(references)}
