"""The six claims: what is trained, what is expected, and when it counts as shown."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from benchmarks.claims.conditions import Arm, Phase
from benchmarks.claims.datasets import Material, picture_metric, text_metrics
from benchmarks.claims.rules import Check, Outcomes, Verdict, at_least, difference
from bifocal.modeling import BifocalModel, load_image
from bifocal.training.tasks import Task

R5, STS = "text retrieval R@5", "STS Spearman"
_JOINT = "joint"


@dataclass(frozen=True)
class Claim:
    """
    Args:
        arms: for the material; each is trained with every seed.
        judge: the rule.
        source: of the claim, a section of the paper or another.
        note: what a reader must know of this trial.
        reason: why a claim is not shown, or what was found besides; of the full trial.
    """

    name: str
    arms: Callable[[Material], Sequence[Arm]]
    judge: Callable[[Outcomes, Material], Verdict]
    title: str
    source: str
    expected: str
    note: str = ""
    reason: str = ""


def _both(model: BifocalModel, material: Material) -> dict[str, float]:
    return {**picture_metric(model, material.pictures), **text_metrics(model, material)}


def _photos(material: Material, batch: int = 128) -> Task:
    return Task("photos", "image-text", material.pictures.train, batch)


def _captions(material: Material, batch: int = 128) -> Task:
    return Task("captions", "text-pair", material.captions.pairs, batch)


# 1. One model for both


def _multi_task(material: Material) -> list[Arm]:
    steps = 350

    def arm(name: str, *tasks: Callable[[Material], Task]) -> Arm:
        return Arm(name, [Phase(_JOINT, lambda m: [make(m) for make in tasks], steps)], _both)

    return [arm("image-text only", _photos), arm("text-text only", _captions), arm("both", _photos, _captions)]


def _judge_multi_task(outcomes: Outcomes, material: Material) -> Verdict:
    zero = material.pictures.measure
    both, image, text = ((name, _JOINT) for name in ("both", "image-text only", "text-text only"))
    texts = [R5] if material.sts is None else [R5, STS]
    return Verdict(
        [
            at_least(outcomes, zero, both, image, -0.02, f"{zero}: both against image-text only"),
            *(at_least(outcomes, m, both, text, -0.03, f"{m}: both against text-text only") for m in texts),
            *(at_least(outcomes, m, both, image, 0.15, f"{m}: both against image-text only") for m in texts),
        ]
    )


# 2. Three stages

_SYMBOL, _LONG = "name finds picture R@5", "long caption finds picture R@5"
_NEAR = "right among 21 near-duplicates"
_SEEN_NEAR = "right before 7 negatives, trained on"


def _digests(images: list[Any]) -> list[str]:
    """What symbols that look alike to the pixel share: they are right answers of each other."""
    from bifocal.evaluation.rows import image_digest

    return [image_digest(load_image(image)) for image in images]


def _symbol_metrics(model: BifocalModel, material: Material) -> dict[str, float]:
    from bifocal.evaluation.retrieval import recall_at, target_ranks

    test = material.symbols["test"]
    shown = [images[0] for images in test["images"]]
    pictures, keys = model.encode_image(shown, batch_size=128, show_progress=False), _digests(shown)

    def recall(texts: list[str]) -> float:
        vectors = model.encode_text(texts, batch_size=128, show_progress=False)
        return recall_at(target_ranks(vectors, pictures, query_keys=texts, item_keys=keys), 5)

    return {_SYMBOL: recall(list(test["name"])), _LONG: recall([texts[0] for texts in test["long_captions"]])}


def _near(model: BifocalModel, material: Material) -> dict[str, float]:
    queries, items, chosen = material.near_duplicates
    a = np.asarray(model.encode_text(queries, batch_size=128, show_progress=False))
    b = np.asarray(model.encode_text(items, batch_size=128, show_progress=False))
    scores = np.einsum("nd,nkd->nk", a, b[chosen])
    return {_NEAR: float((scores[:, 1:].max(axis=1) < scores[:, 0]).mean())}


def _staged(model: BifocalModel, material: Material) -> dict[str, float]:
    return {**_symbol_metrics(model, material), **text_metrics(model, material), **_near(model, material)}


def _symbols(material: Material, column: str, batch: int) -> Task:
    rows = material.symbols["train"].select_columns(["images", column])
    rows = rows.rename_columns({"images": "image", column: "caption"})
    from datasets import Image, List

    return Task("symbols", "image-text", rows.cast_column("image", List(Image(decode=False))), batch)


def _triplets(material: Material, negatives: int, batch: int) -> Task:
    kind = "text-triplet" if negatives else "text-pair"
    return Task("captions", kind, material.triplets(negatives), batch)


def _three_stages(material: Material) -> list[Arm]:
    one = Phase("stage 1", lambda m: [_symbols(m, "name", 128), _captions(m, 64)], 500, augment=False)
    two = Phase("stage 2", lambda m: [_symbols(m, "long_captions", 96), _captions(m, 64)], 120, 4e-4, augment=False)
    three = Phase(
        "stage 3", lambda m: [_symbols(m, "long_captions", 64), _triplets(m, 7, 32)], 100, 3e-4, augment=False
    )
    # As many steps of the first stage's kind, to tell a stage from mere training.
    more = Phase("stage 1 again", lambda m: [_symbols(m, "name", 128), _captions(m, 64)], 120, 4e-4, augment=False)
    return [Arm("three stages", [one, two, three], _staged, 8), Arm("stage 1, longer", [one, more], _staged, 8)]


def _judge_stages(outcomes: Outcomes, material: Material) -> Verdict:
    stages = [("three stages", f"stage {number}") for number in (1, 2, 3)]
    longer = ("stage 1, longer", "stage 1 again")
    return Verdict(
        [
            at_least(
                outcomes, _LONG, stages[1], longer, 0.02, f"{_LONG}: stage 2 against as many more steps of stage 1"
            ),
            at_least(outcomes, _SYMBOL, stages[1], stages[0], -0.03, f"{_SYMBOL}: stage 2 against stage 1"),
            at_least(outcomes, _NEAR, stages[2], stages[1], 0.01, f"{_NEAR}: stage 3 against stage 2"),
            at_least(outcomes, _LONG, stages[2], stages[1], -0.03, f"{_LONG}: stage 3 against stage 2"),
        ]
    )


# 3. Where the text tower begins


def _masked_first(material: Material) -> list[Arm]:
    masked = Phase("masked words", None, 400, 1e-3, 48, masked=64)
    embedder = Phase("text pairs", lambda m: [_captions(m)], 250)

    def joint(steps: int) -> Phase:
        return Phase(_JOINT, lambda m: [_photos(m, 96), _captions(m, 64)], steps)

    return [
        Arm("from nothing", [joint(350)], _both, 8),
        Arm("from nothing, fewer steps", [joint(200)], _both, 8),  # to tell what a beginning gives; not judged
        Arm("from masked language modelling", [masked, joint(200)], _both, 8),
        Arm("from a text embedder", [embedder, joint(200)], _both, 8),
    ]


def _judge_masked(outcomes: Outcomes, material: Material) -> Verdict:
    nothing = ("from nothing", _JOINT)
    texts = [R5] if material.sts is None else [R5, STS]
    return Verdict(
        [
            at_least(outcomes, metric, (arm, _JOINT), nothing, 0.0, f"{metric}: {arm} against from nothing")
            for arm in ("from masked language modelling", "from a text embedder")
            for metric in texts
        ]
    )


# 4. Hard negatives


def _near_and_texts(model: BifocalModel, material: Material) -> dict[str, float]:
    return {**_near(model, material), _SEEN_NEAR: _near_seen(model, material), **text_metrics(model, material)}


def _near_seen(model: BifocalModel, material: Material, count: int = 1000) -> float:
    """On captions that were trained on: not part of the verdict, but it tells whether the negatives do their work."""
    rows = material.triplets(7)[:count]
    flat = [text for texts in rows["negatives"] for text in texts]
    query, right, wrong = (
        np.asarray(model.encode_text(texts, batch_size=128, show_progress=False))
        for texts in (rows["query"], rows["positive"], flat)
    )
    wrong = wrong.reshape(len(query), 7, -1)
    return float((np.einsum("nd,nkd->nk", query, wrong).max(axis=1) < (query * right).sum(axis=1)).mean())


def _hard_negatives(material: Material) -> list[Arm]:
    first = Phase("pairs", lambda m: [_captions(m, 128)], 200)

    def arm(count: int) -> Arm:
        second = Phase("negatives", lambda m: [_triplets(m, count, 64)], 600)
        return Arm(f"{count} negatives", [first, second], _near_and_texts)

    return [arm(count) for count in (0, 1, 3, 7)]


def _judge_negatives(outcomes: Outcomes, material: Material) -> Verdict:
    none = ("0 negatives", "negatives")
    seven = ("7 negatives", "negatives")
    return Verdict(
        [
            at_least(outcomes, _NEAR, seven, none, 0.01, f"{_NEAR}: 7 negatives against none"),
            at_least(outcomes, _NEAR, seven, ("1 negatives", "negatives"), 0.0, f"{_NEAR}: 7 negatives against 1"),
            at_least(outcomes, R5, seven, none, -0.02, f"{R5}: 7 negatives against none"),
        ]
    )


# 5. Long captions

_SENTENCES = (1, 2, 3, 5)


def _by_length(model: BifocalModel, material: Material) -> dict[str, float]:
    """Recall@5 by the number of sentences that are left of a long caption."""
    from bifocal.evaluation.retrieval import recall_at, target_ranks

    test = material.symbols["test"]
    shown = [images[0] for images in test["images"]]
    pictures, keys = model.encode_image(shown, batch_size=128, show_progress=False), _digests(shown)
    metrics = {}
    for count in _SENTENCES:
        texts = [". ".join(captions[0].split(". ")[:count]) for captions in test["long_captions"]]
        vectors = model.encode_text(texts, batch_size=128, show_progress=False)
        metrics[f"{count} sentence{'s' * (count > 1)}"] = recall_at(
            target_ranks(vectors, pictures, query_keys=texts, item_keys=keys), 5
        )
    return metrics


def _long_captions(material: Material) -> list[Arm]:
    one = Phase("names", lambda m: [_symbols(m, "name", 128)], 450, augment=False)

    def arm(name: str, column: str) -> Arm:
        return Arm(
            name, [one, Phase("then", lambda m: [_symbols(m, column, 96)], 150, 4e-4, augment=False)], _by_length, 8
        )

    return [arm("short captions only", "name"), arm("then long captions", "long_captions")]


def _judge_long(outcomes: Outcomes, material: Material) -> Verdict:
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


# 6. Large batches

_BATCHES = (64, 256, 1024, 4096)
_SEEN = 98_304  # pairs in all, at full budget


def _large_batches(material: Material) -> list[Arm]:
    arms = []
    for batch in _BATCHES:
        # The rate grows with the root of the batch, as is usual with Adam; chunks keep the memory as it is.
        rate = 1e-3 * (batch / 256) ** 0.5
        options = {"text_chunk_size": 256} if batch > 256 else {}
        made = _pairs_of(batch)
        arms.append(Arm(f"batch {batch:,}", [Phase(_JOINT, made, _SEEN // batch, rate, options=options)], text_metrics))
    return arms


def _pairs_of(batch: int) -> Callable[[Material], list[Task]]:
    return lambda material: [_captions(material, min(batch, len(material.captions.train)))]


def _judge_batches(outcomes: Outcomes, material: Material) -> Verdict:
    found = {b: difference(outcomes, R5, (f"batch {b:,}", _JOINT), ("batch 64", _JOINT))[0] for b in _BATCHES}
    best, larger = (max(batches, key=found.__getitem__) for batches in (_BATCHES, _BATCHES[1:]))
    return Verdict(
        [
            Check(f"{R5}: the best larger batch ({larger:,}) against 64", found[larger], 0.01),
            Check("the best batch is larger than 64", float(best > 64), 1.0),
        ]
    )


def _claims() -> dict[str, Claim]:
    """The claims with what is said of them in `claims.yaml`."""
    tried = {
        "multi-task": (_multi_task, _judge_multi_task),
        "stages": (_three_stages, _judge_stages),
        "mlm-first": (_masked_first, _judge_masked),
        "hard-negatives": (_hard_negatives, _judge_negatives),
        "long-captions": (_long_captions, _judge_long),
        "large-batches": (_large_batches, _judge_batches),
    }
    texts = yaml.safe_load(Path(__file__).with_name("claims.yaml").read_text(encoding="utf-8"))
    return {name: Claim(name, *tried[name], **said) for name, said in texts.items()}


CLAIMS = _claims()
