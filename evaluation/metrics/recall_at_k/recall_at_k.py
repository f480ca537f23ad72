# Copyright 2026 The Bifocal authors. Licensed under the Apache License, Version 2.0.
"""Recall@k by both definitions in use, as a metric for the `evaluate` library."""

import datasets
import evaluate

_DESCRIPTION = """
Recall among the first k items of a ranking. If a query has several right items, two definitions are in use: "any"
counts a query as 1 if any of them is among the first k (CLIP-benchmark, published tables of image-text retrieval);
"share" is the share of them that are among the first k (mteb, information retrieval).
"""
_INPUTS = """
Args:
    predictions: ranked ids of each query, best first.
    references: ids of the right items of each query.
    k: number of first items that count.
    definition: "any" or "share".

Returns:
    recall_at_k: mean over the queries.
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
            raise ValueError(f"'{definition}' is not a definition of recall; choose 'any' or 'share'.")
        if k < 1:
            raise ValueError(f"k must be at least 1, but it is {k}.")
        total = 0.0
        for number, (ranking, right) in enumerate(zip(predictions, references, strict=True)):
            if not right:
                raise ValueError(f"Query {number} has no right item; remove it.")
            hits = len(set(ranking[:k]) & set(right))
            total += min(hits, 1) if definition == "any" else hits / len(set(right))
        return {"recall_at_k": total / len(references)}
