"""How the text tower is initialised: from nothing, from masked language modelling, or from a finished embedder."""

import re
from functools import cache

import numpy as np
from scipy.stats import spearmanr

from benchmarks.claims.conditions import Condition, Phase
from benchmarks.claims.datasets import ClaimData, image_metric, text_metrics
from benchmarks.claims.rules import R5, STS, Outcomes, Verdict, at_least
from bifocal.modeling import BifocalModel
from bifocal.training.tasks import Task

JOINT = "joint"
MASKED_STEPS = 4000
# What else the processor time of the masked steps buys, by a timing run on one core: 0.134 s for a step of masked
# words, 0.283 s for a joint step, 0.213 s for a step of 128 text pairs.
JOINT_STEPS, PAIR_STEPS = 200, 150
_AS_LONG_AS_PAIRS, _AS_LONG_AS_MASKED = 313, 2100
KNOWN, OTHER = "STS, words of the captions", "STS, other words"
NOTHING, MASKED = "from nothing", "from masked language modelling"
EMBEDDER, LONGER = "from a finished embedder", "from masked language modelling, as long as the embedder"
SAME_BUDGET = "from nothing, as long with masked language modelling"


def pretraining_conditions(data: ClaimData) -> list[Condition]:
    masked = Phase("masked words", None, MASKED_STEPS, 1e-3, 48, masked=64)
    pairs = Phase("text pairs", lambda d: [Task("captions", "text-pair", d.captions.pairs, 128)], PAIR_STEPS)
    gentle = {"text_learning_rate": 5e-4}

    def joint(steps: int, **options: float) -> Phase:
        return Phase(JOINT, _tasks, steps, options=options)

    def condition(name: str, *phases: Phase) -> Condition:
        return Condition(name, phases, measure, 8)

    return [
        condition(NOTHING, joint(JOINT_STEPS)),
        condition(MASKED, masked, joint(JOINT_STEPS)),
        condition(EMBEDDER, masked, pairs, joint(JOINT_STEPS)),
        condition(LONGER, masked, joint(_AS_LONG_AS_PAIRS)),
        condition(SAME_BUDGET, joint(_AS_LONG_AS_MASKED)),
        # To explain the outcome; not judged.
        condition("masked language modelling alone", masked, Phase("as it is", _tasks, 0)),
        condition("from nothing, a third of the text rate", joint(JOINT_STEPS, **gentle)),
        condition("from masked language modelling, a third of the text rate", masked, joint(JOINT_STEPS, **gentle)),
    ]


def _tasks(data: ClaimData) -> list[Task]:
    return [
        Task("photos", "image-text", data.images.train, 96),
        Task("captions", "text-pair", data.captions.pairs, 64),
    ]


def measure(model: BifocalModel, data: ClaimData) -> dict[str, float]:
    """Return the metrics of images and texts, and STS apart for pairs whose words all occur in the captions."""
    metrics = {**image_metric(model, data.images), **text_metrics(model, data)}
    if data.sts is not None:
        first, second, scores = data.sts
        vectors = [np.asarray(model.encode_text(side, batch_size=128, show_progress=False)) for side in (first, second)]
        similarities = (vectors[0] * vectors[1]).sum(axis=1)
        known = known_pairs(data)
        for name, chosen in ((KNOWN, known), (OTHER, ~known)):
            if chosen.sum() > 1:
                metrics[name] = float(spearmanr(similarities[chosen], np.array(scores)[chosen]).statistic)
    return metrics


def known_pairs(data: ClaimData) -> np.ndarray:
    """Return for each STS pair whether every word of it occurs in the captions that are trained on."""
    assert data.sts is not None
    words = _words_of_captions(data)
    return np.array([set(_words(f"{a} {b}")) <= words for a, b in zip(data.sts[0], data.sts[1], strict=True)])


@cache
def _words_of_captions(data: ClaimData) -> frozenset[str]:
    return frozenset(word for texts in data.captions.train for text in texts for word in _words(text))


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def judge_masked_first(outcomes: Outcomes, data: ClaimData) -> Verdict:
    """The budget of masked language modelling does not count, as in the paper."""
    zero = data.images.metric
    nothing, masked, embedder, longer = ((name, JOINT) for name in (NOTHING, MASKED, EMBEDDER, LONGER))
    texts = [R5] if data.sts is None else [R5, STS]
    return Verdict(
        [
            *(at_least(outcomes, m, masked, nothing, 0.0, f"{m}: {MASKED} against {NOTHING}") for m in texts),
            *(at_least(outcomes, m, longer, embedder, 0.0, f"{m}: {LONGER}, against it") for m in (zero, R5)),
        ]
    )


def judge_masked_budget(outcomes: Outcomes, data: ClaimData) -> Verdict:
    """The budget of masked language modelling counts."""
    texts = [R5] if data.sts is None else [R5, STS]
    masked, nothing = (MASKED, JOINT), (SAME_BUDGET, JOINT)
    return Verdict(
        [
            at_least(outcomes, m, masked, nothing, 0.0, f"{m}: {MASKED} against {SAME_BUDGET.partition(', ')[2]}")
            for m in texts
        ]
    )
