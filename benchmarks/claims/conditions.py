"""An arm of a claim: what is trained, in phases, and measured after each; killed, it goes on."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.claims.datasets import LENGTH, SIDE, Material, flip_and_shift
from bifocal.files import RUN, remove_folder, replace_file, replace_folder, write_json
from bifocal.modeling import BifocalConfig, BifocalModel, BifocalTextModel
from bifocal.training.checkpoints import last_complete_checkpoint, remove_checkpoints
from bifocal.training.tasks import Task

TEXT = dict(hidden_size=128, num_hidden_layers=2, num_attention_heads=4, intermediate_size=256,
            max_position_embeddings=512, hidden_dropout_prob=0.0, initializer_range=0.05)  # fmt: skip
IMAGE = dict(hidden_size=128, num_hidden_layers=3, num_attention_heads=4, intermediate_size=341, image_size=SIDE,
             patch_size=4, patch_dropout=0.0, rope_reference_grid=8, initializer_range=0.05)  # fmt: skip
Measure = Callable[[BifocalModel, Material], dict[str, float]]


@dataclass(frozen=True)
class Phase:
    """
    Args:
        tasks: made of the material; or none for masked language modelling of the texts.
        steps: at full budget.
        options: training arguments.
        masked: batch of masked language modelling.
    """

    name: str
    tasks: Callable[[Material], Sequence[Task]] | None
    steps: int
    learning_rate: float = 1.5e-3
    max_length: int = LENGTH
    options: dict[str, Any] = field(default_factory=dict)
    augment: bool = True
    masked: int = 0


@dataclass(frozen=True)
class Arm:
    """
    Args:
        measure: after each phase but masked language modelling.
        image_patch: of the image tower; None for its usual one.
    """

    name: str
    phases: Sequence[Phase]
    measure: Measure
    image_patch: int | None = None


def run_arm(
    arm: Arm, arms: Sequence[Arm], seed: int, scale: float, material: Material, folder: Path
) -> dict[str, dict[str, float]]:
    """Train an arm and return its metrics by phase; what is finished in `folder` is not done again.

    Args:
        arms: all of the claim. Those that begin with the same phases share them: they would be the same to the bit.
        scale: factor of all steps.
        folder: of the claim and the seed; each arm has one in it.
    """
    told = folder / file_name(arm.name) / "metrics.json"
    if told.exists():
        return json.loads(told.read_text(encoding="utf-8"))
    told.parent.mkdir(parents=True, exist_ok=True)
    found: dict[str, dict[str, float]] = {}
    before: Path | None = None
    for number, phase in enumerate(arm.phases, 1):
        owner = next(other for other in arms if _begins_alike(other, arm, number))
        place = folder / file_name(owner.name) / file_name(phase.name)
        done = place / "done.json"
        if not done.exists():
            started = time.monotonic()
            steps = max(8, round(phase.steps * scale))
            if phase.masked:
                _train_masked(phase, seed, steps, material, place)
                metrics: dict[str, float] = {}
            else:
                model = _start(arm, seed, before, material)
                _train(phase, model, seed, steps, material, place)
                metrics = arm.measure(model, material)
                with replace_folder(place / "model", RUN) as made:
                    model.save_pretrained(made)
            remove_checkpoints(place)
            # Of a run that was killed, only its last session.
            write_json(done, {"metrics": metrics, "steps": steps, "seconds": round(time.monotonic() - started, 1)})
        found[phase.name] = json.loads(done.read_text(encoding="utf-8"))["metrics"]
        before = place / "model"
    write_json(told, found)
    return found


def _begins_alike(one: Arm, other: Arm, phases: int) -> bool:
    same = one.phases[:phases] == other.phases[:phases] and one.image_patch == other.image_patch
    return same and one.measure is other.measure


def forget_weights(folder: Path) -> None:
    """Delete the models of a claim and seed that are finished."""
    for model in folder.glob("*/*/model"):
        remove_folder(model, RUN)


def file_name(name: str) -> str:
    return name.replace(" ", "-").replace(",", "")


def _start(arm: Arm, seed: int, before: Path | None, material: Material) -> BifocalModel:
    """A new model, the phase's before, or a new one with the text tower of masked language modelling."""
    from transformers import set_seed

    set_seed(seed)
    tokens = -(-len(material.processor.tokenizer) // 64) * 64
    image = (
        IMAGE
        if arm.image_patch is None
        else {**IMAGE, "patch_size": arm.image_patch, "rope_reference_grid": SIDE // arm.image_patch}
    )
    config = BifocalConfig(text_config={**TEXT, "vocab_size": tokens}, vision_config=image, projection_dim=128)
    model = BifocalModel(config)
    if before is not None:
        kinds = json.loads((before / "config.json").read_text(encoding="utf-8"))["architectures"]
        if kinds == ["BifocalModel"]:
            model = BifocalModel.from_pretrained(before)
        else:
            model.text_model.load_state_dict(BifocalTextModel.from_pretrained(before).state_dict())
    model.processor = material.processor
    return model


def _train(phase: Phase, model: BifocalModel, seed: int, steps: int, material: Material, place: Path) -> None:
    from transformers.trainer_callback import ProgressCallback

    from bifocal.training.arguments import BifocalTrainingArguments
    from bifocal.training.trainer import MultiTaskTrainer

    assert phase.tasks is not None
    options = dict(
        learning_rate=phase.learning_rate, warmup_steps=max(1, steps // 10), lr_scheduler_type="cosine",
        adam_beta2=0.98, weight_decay=0.05, logging_steps=max(1, steps // 20), save_steps=max(20, steps // 4),
        save_total_limit=1, report_to="none", disable_tqdm=True, log_level="error",
    )  # fmt: skip
    args = BifocalTrainingArguments(output_dir=str(place), max_steps=steps, seed=seed, **{**options, **phase.options})
    trainer = MultiTaskTrainer(
        model, args, list(phase.tasks(material)), material.processor, phase.max_length,
        augment=flip_and_shift if phase.augment else None,
    )  # fmt: skip
    trainer.remove_callback(ProgressCallback)
    from transformers.trainer_callback import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    checkpoint = last_complete_checkpoint(place)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))


def _train_masked(phase: Phase, seed: int, steps: int, material: Material, place: Path) -> None:
    """Stage 0 on the captions, by the recipe that users have."""
    from bifocal.training.mlm import train_mlm
    from bifocal.training.recipe import Recipe

    texts = material.out / "texts.jsonl"
    with material.lock:
        if not texts.exists():
            lines = [json.dumps({"text": text}) for texts_ in material.captions.train for text in texts_]
            with replace_file(texts) as scratch:
                scratch.write_text("\n".join(lines) + "\n", encoding="utf-8")
    _ = material.processor
    recipe = Recipe.model_validate(
        {
            "name": "masked", "output_dir": str(place), "seed": seed, "processor": str(material.out / "processor"),
            "model": TEXT, "max_length": phase.max_length,
            "mlm": {"data": {"path": str(texts)}, "batch_size": phase.masked},
            "training": {"max_steps": steps, "learning_rate": phase.learning_rate, "warmup_steps": max(1, steps // 10),
                         "save_steps": max(20, steps // 4), "disable_tqdm": True, "logging_steps": steps},
        }
    )  # fmt: skip
    place.mkdir(parents=True, exist_ok=True)
    train_mlm(recipe)
