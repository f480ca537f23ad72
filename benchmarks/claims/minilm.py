"""Claims on a text model that people use: MiniLM learns images and keeps its texts, trained along or frozen."""

import tempfile
from collections.abc import Callable
from typing import Any

from benchmarks.claims.collection import IMAGE, TITLE, collection_metrics
from benchmarks.claims.conditions import Condition, Phase
from benchmarks.claims.datasets import ClaimData, load_minilm, text_metrics
from benchmarks.claims.rules import R5, STS, Outcomes, Verdict, at_least
from bifocal.modeling import BifocalModel, BifocalVisionConfig, BifocalVisionModel
from bifocal.modeling.processing_bifocal import image_processor_of_size
from bifocal.training.tasks import Task

PHASE = "joint"
STEPS = 120
LENGTH = 20  # tokens: most titles with tags, and most captions, are shorter; longer ones are cut in training only
AS_IT_IS, IMAGES, TEXTS, BOTH = "MiniLM as it is", "image-text only", "text-text only", "both"
FROZEN = "image-text only, text tower frozen"
_SIDE = 64
_IMAGE: dict[str, Any] = dict(
    hidden_size=192, num_hidden_layers=4, num_attention_heads=4, intermediate_size=512, image_size=_SIDE,
    patch_size=8, patch_dropout=0.0, rope_reference_grid=8, initializer_range=0.05,
)  # fmt: skip
_RATES = {"text_learning_rate": 5e-5, "image_learning_rate": 1e-3}


def minilm_with_images(data: ClaimData) -> BifocalModel:
    """Return MiniLM joined with a new image tower, whose linear head leads into MiniLM's space.

    Raises:
        ClaimsError: if MiniLM is not installed.
    """
    tower = BifocalVisionModel(BifocalVisionConfig(**_IMAGE))
    with tempfile.TemporaryDirectory() as folder:
        tower.save_pretrained(folder)
        image_processor_of_size(_SIDE).save_pretrained(folder)
        return load_minilm(lambda path: BifocalModel.from_towers(path, folder))


def minilm_conditions(data: ClaimData) -> list[Condition]:
    return [
        _condition(AS_IT_IS, 0),  # for comparison; not judged
        _condition(IMAGES, STEPS, _images),
        _condition(TEXTS, STEPS, _captions),
        _condition(BOTH, STEPS, _images, _captions),
    ]


def freezing_conditions(data: ClaimData) -> list[Condition]:
    frozen = _condition(FROZEN, STEPS, _images, freeze_text_tower=True)
    return [*(one for one in minilm_conditions(data) if one.name in (IMAGES, BOTH)), frozen]


def _condition(name: str, steps: int, *tasks: Callable[[ClaimData], Task], **options: Any) -> Condition:
    phase = Phase(PHASE, lambda d: [make(d) for make in tasks], steps, 1e-3, LENGTH, _RATES | options, augment=None)
    return Condition(name, [phase], _measure, new_model=minilm_with_images)


def _images(data: ClaimData) -> Task:
    return Task("images", "image-text", data.collection.train, 128)


def _captions(data: ClaimData) -> Task:
    return Task("captions", "text-pair", data.captions.pairs, 64)


def _measure(model: BifocalModel, data: ClaimData) -> dict[str, float]:
    return {**collection_metrics(model, data.collection), **text_metrics(model, data)}


def judge_minilm(outcomes: Outcomes, data: ClaimData) -> Verdict:
    both, image, text = ((name, PHASE) for name in (BOTH, IMAGES, TEXTS))
    checks = [
        at_least(outcomes, TITLE, both, image, -0.03, f"{TITLE}: both against image-text only"),
        at_least(outcomes, R5, both, text, -0.02, f"{R5}: both against text-text only"),
        at_least(outcomes, R5, both, image, 0.05, f"{R5}: both against image-text only"),
    ]
    if data.sts is not None:
        checks.append(at_least(outcomes, STS, both, text, -0.01, f"{STS}: both against text-text only"))
    return Verdict(checks)


def judge_freezing(outcomes: Outcomes, data: ClaimData) -> Verdict:
    both, frozen = (BOTH, PHASE), (FROZEN, PHASE)
    return Verdict(
        [
            at_least(outcomes, TITLE, both, frozen, 0.0, f"{TITLE}: both against the text tower frozen"),
            at_least(outcomes, IMAGE, both, frozen, 0.0, f"{IMAGE}: both against the text tower frozen"),
            at_least(outcomes, R5, both, frozen, 0.0, f"{R5}: both against the text tower frozen"),
        ]
    )
