"""Claims on small towers from nothing: both tasks, stages, hard negatives, long captions, large batches."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.claims.conditions import Condition, Phase
from benchmarks.claims.datasets import ClaimData, both_metrics, text_metrics
from benchmarks.claims.near_duplicates import NEAR, near_duplicates, right_among
from benchmarks.claims.rules import R5, STS, Check, Outcomes, Verdict, at_least, difference
from bifocal.evaluation.retrieval import recall_at, target_ranks
from bifocal.evaluation.rows import image_digest
from bifocal.modeling import BifocalModel, load_image
from bifocal.training.tasks import Task

_JOINT = "joint"


def _photos(data: ClaimData, batch: int = 128) -> Task:
    return Task("photos", "image-text", data.images.train, batch)


def _captions(data: ClaimData, batch: int = 128) -> Task:
    return Task("captions", "text-pair", data.captions.pairs, batch)


# 1. One model for both


def multi_task_conditions(data: ClaimData) -> list[Condition]:
    steps = 350

    def condition(name: str, *tasks: Callable[[ClaimData], Task]) -> Condition:
        return Condition(name, [Phase(_JOINT, lambda d: [make(d) for make in tasks], steps)], both_metrics)

    return [
        condition("image-text only", _photos),
        condition("text-text only", _captions),
        condition("both", _photos, _captions),
    ]


def judge_multi_task(outcomes: Outcomes, data: ClaimData) -> Verdict:
    zero = data.images.metric
    both, image, text = ((name, _JOINT) for name in ("both", "image-text only", "text-text only"))
    texts = [R5] if data.sts is None else [R5, STS]
    return Verdict(
        [
            at_least(outcomes, zero, both, image, -0.02, f"{zero}: both against image-text only"),
            *(at_least(outcomes, m, both, text, -0.03, f"{m}: both against text-text only") for m in texts),
            *(at_least(outcomes, m, both, image, 0.15, f"{m}: both against image-text only") for m in texts),
        ]
    )


# 2. Three stages

_SYMBOL, _LONG = "name finds image R@5", "long caption finds image R@5"
_SEEN_NEAR = "right before 7 negatives, trained on"


def _symbol_recall(model: BifocalModel, test: Any, queries: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """Return Recall@5 from texts to the images of symbols, by name of the metric.

    Args:
        model: the model.
        test: symbols; identical ones are right answers of each other.
        queries: for each metric a text per symbol.
    """
    images = [images[0] for images in test["images"]]
    image_vectors = model.encode_image(images, batch_size=128, show_progress=False)
    digests = [image_digest(load_image(image)) for image in images]
    metrics = {}
    for metric, texts in queries.items():
        vectors = model.encode_text(list(texts), batch_size=128, show_progress=False)
        metrics[metric] = recall_at(target_ranks(vectors, image_vectors, query_keys=texts, item_keys=digests), 5)
    return metrics


def _symbol_metrics(model: BifocalModel, data: ClaimData) -> dict[str, float]:
    test = data.symbols["test"]
    long_captions = [captions[0] for captions in test["long_captions"]]
    return _symbol_recall(model, test, {_SYMBOL: list(test["name"]), _LONG: long_captions})


def _near(model: BifocalModel, data: ClaimData) -> dict[str, float]:
    return {NEAR: right_among(model, near_duplicates(data))}


def _staged(model: BifocalModel, data: ClaimData) -> dict[str, float]:
    return {**_symbol_metrics(model, data), **text_metrics(model, data), **_near(model, data)}


def _symbols(data: ClaimData, column: str, batch: int) -> Task:
    return Task("symbols", "image-text", data.captioned_symbols(column), batch)


def _triplets(data: ClaimData, negatives: int, batch: int) -> Task:
    return Task("captions", "text-triplet" if negatives else "text-pair", data.triplets(negatives), batch)


def stage_conditions(data: ClaimData) -> list[Condition]:
    one = Phase("stage 1", lambda d: [_symbols(d, "name", 128), _captions(d, 64)], 500, augment=None)
    two = Phase("stage 2", lambda d: [_symbols(d, "long_captions", 96), _captions(d, 64)], 120, 4e-4, augment=None)
    three = Phase("stage 3", lambda d: [_symbols(d, "long_captions", 64), _triplets(d, 7, 32)], 100, 3e-4, augment=None)
    # As many more steps of stage 1, to separate the effect of a stage from that of longer training.
    more = Phase("stage 1 again", lambda d: [_symbols(d, "name", 128), _captions(d, 64)], 120, 4e-4, augment=None)
    return [
        Condition("three stages", [one, two, three], _staged, 8),
        Condition("stage 1, longer", [one, more], _staged, 8),
    ]


def judge_stages(outcomes: Outcomes, data: ClaimData) -> Verdict:
    stages = [("three stages", f"stage {number}") for number in (1, 2, 3)]
    longer = ("stage 1, longer", "stage 1 again")
    return Verdict(
        [
            at_least(
                outcomes, _LONG, stages[1], longer, 0.02, f"{_LONG}: stage 2 against as many more steps of stage 1"
            ),
            at_least(outcomes, _SYMBOL, stages[1], stages[0], -0.03, f"{_SYMBOL}: stage 2 against stage 1"),
            at_least(outcomes, NEAR, stages[2], stages[1], 0.01, f"{NEAR}: stage 3 against stage 2"),
            at_least(outcomes, _LONG, stages[2], stages[1], -0.03, f"{_LONG}: stage 3 against stage 2"),
        ]
    )


# 3. Hard negatives


def _near_and_texts(model: BifocalModel, data: ClaimData) -> dict[str, float]:
    return {**_near(model, data), _SEEN_NEAR: _near_seen(model, data), **text_metrics(model, data)}


def _near_seen(model: BifocalModel, data: ClaimData, count: int = 1000) -> float:
    """Return the same on captions that were trained on. It is not judged, but shows whether the negatives work."""
    rows = data.triplets(7)[:count]
    flat = [text for texts in rows["negatives"] for text in texts]
    query, right, wrong = (
        np.asarray(model.encode_text(texts, batch_size=128, show_progress=False))
        for texts in (rows["query"], rows["positive"], flat)
    )
    wrong = wrong.reshape(len(query), 7, -1)
    return float((np.einsum("nd,nkd->nk", query, wrong).max(axis=1) < (query * right).sum(axis=1)).mean())


def hard_negative_conditions(data: ClaimData) -> list[Condition]:
    first = Phase("pairs", lambda d: [_captions(d, 128)], 200)

    def condition(count: int) -> Condition:
        second = Phase("negatives", lambda d: [_triplets(d, count, 64)], 600)
        return Condition(f"{count} negatives", [first, second], _near_and_texts)

    return [condition(count) for count in (0, 1, 3, 7)]


def judge_hard_negatives(outcomes: Outcomes, data: ClaimData) -> Verdict:
    none = ("0 negatives", "negatives")
    seven = ("7 negatives", "negatives")
    return Verdict(
        [
            at_least(outcomes, NEAR, seven, none, 0.01, f"{NEAR}: 7 negatives against none"),
            at_least(outcomes, NEAR, seven, ("1 negatives", "negatives"), 0.0, f"{NEAR}: 7 negatives against 1"),
            at_least(outcomes, R5, seven, none, -0.02, f"{R5}: 7 negatives against none"),
        ]
    )


# 4. Long captions

_SENTENCES = (1, 2, 3, 5)


def _by_length(model: BifocalModel, data: ClaimData) -> dict[str, float]:
    """Return Recall@5 by the number of first sentences of a long caption."""
    test = data.symbols["test"]
    queries = {
        f"{count} sentence{'s' * (count > 1)}": [
            ". ".join(captions[0].split(". ")[:count]) for captions in test["long_captions"]
        ]
        for count in _SENTENCES
    }
    return _symbol_recall(model, test, queries)


def long_caption_conditions(data: ClaimData) -> list[Condition]:
    one = Phase("names", lambda d: [_symbols(d, "name", 128)], 450, augment=None)

    def condition(name: str, column: str) -> Condition:
        return Condition(
            name, [one, Phase("then", lambda d: [_symbols(d, column, 96)], 150, 4e-4, augment=None)], _by_length, 8
        )

    return [condition("short captions only", "name"), condition("then long captions", "long_captions")]


def judge_long_captions(outcomes: Outcomes, data: ClaimData) -> Verdict:
    long, short = ("then long captions", "then"), ("short captions only", "then")
    return Verdict(
        [
            at_least(
                outcomes, "5 sentences", long, short, 0.05, "R@5 by 5 sentences: long captions against short ones only"
            ),
            at_least(
                outcomes, "3 sentences", long, short, 0.03, "R@5 by 3 sentences: long captions against short ones only"
            ),
            at_least(
                outcomes, "1 sentence", long, short, -0.03, "R@5 by 1 sentence: long captions against short ones only"
            ),
        ]
    )


# 5. Large batches

_BATCHES = (64, 256, 1024, 4096)
_PAIRS = 98_304  # seen in training, at full budget


def large_batch_conditions(data: ClaimData) -> list[Condition]:
    conditions = []
    for batch in _BATCHES:
        # The learning rate grows with the square root of the batch, as is usual with Adam; chunks bound the memory.
        rate = 1e-3 * (batch / 256) ** 0.5
        options = {"text_chunk_size": 256} if batch > 256 else {}
        tasks = _caption_task(batch)
        conditions.append(
            Condition(f"batch {batch:,}", [Phase(_JOINT, tasks, _PAIRS // batch, rate, options=options)], text_metrics)
        )
    return conditions


def _caption_task(batch: int) -> Callable[[ClaimData], list[Task]]:
    return lambda data: [_captions(data, min(batch, len(data.captions.train)))]


def judge_large_batches(outcomes: Outcomes, data: ClaimData) -> Verdict:
    gains = {b: difference(outcomes, R5, (f"batch {b:,}", _JOINT), ("batch 64", _JOINT))[0] for b in _BATCHES}
    best, larger = (max(batches, key=gains.__getitem__) for batches in (_BATCHES, _BATCHES[1:]))
    return Verdict(
        [
            Check(f"{R5}: the best larger batch ({larger:,}) against 64", gains[larger], 0.01),
            Check("the best batch is larger than 64", float(best > 64), 1.0),
        ]
    )
