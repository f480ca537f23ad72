"""The claim on a text model that people use: MiniLM learns images and keeps its texts."""

import tempfile
from collections.abc import Callable
from typing import Any

from benchmarks.claims.collection import TITLE, collection_metrics
from benchmarks.claims.conditions import Condition, Phase
from benchmarks.claims.datasets import ClaimData, load_minilm, text_metrics
from benchmarks.claims.rules import Outcomes, Verdict, at_least
from bifocal.modeling import BifocalModel, BifocalVisionConfig, BifocalVisionModel
from bifocal.modeling.processing_bifocal import image_processor_of_size
from bifocal.training.tasks import Task

R5, STS = "text retrieval R@5", "STS Spearman"
PHASE = "joint"
STEPS = 120
LENGTH = 20  # tokens: most titles with tags, and most captions, are shorter; longer ones are cut in training only
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
    def condition(name: str, steps: int, *tasks: Callable[[ClaimData], Task]) -> Condition:
        phase = Phase(PHASE, lambda d: [make(d) for make in tasks], steps, 1e-3, LENGTH, _RATES, augment=False)
        return Condition(name, [phase], _measure, new_model=minilm_with_images)

    return [
        condition("MiniLM as it is", 0),  # for comparison; not judged
        condition("image-text only", STEPS, _images),
        condition("text-text only", STEPS, _captions),
        condition("both", STEPS, _images, _captions),
    ]


def _images(data: ClaimData) -> Task:
    return Task("images", "image-text", data.collection.train, 128)


def _captions(data: ClaimData) -> Task:
    return Task("captions", "text-pair", data.captions.pairs, 64)


def _measure(model: BifocalModel, data: ClaimData) -> dict[str, float]:
    return {**collection_metrics(model, data.collection), **text_metrics(model, data)}


def judge_minilm(outcomes: Outcomes, data: ClaimData) -> Verdict:
    both, image, text = ((name, PHASE) for name in ("both", "image-text only", "text-text only"))
    checks = [
        at_least(outcomes, TITLE, both, image, -0.03, f"{TITLE}: both against image-text only"),
        at_least(outcomes, R5, both, text, -0.02, f"{R5}: both against text-text only"),
        at_least(outcomes, R5, both, image, 0.05, f"{R5}: both against image-text only"),
    ]
    if data.sts is not None:
        checks.append(at_least(outcomes, STS, both, text, -0.01, f"{STS}: both against text-text only"))
    return Verdict(checks)
