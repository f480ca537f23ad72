"""Conditions of a claim: training in phases, with a measurement after each phase. A killed run resumes."""

import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from transformers import set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from benchmarks.claims.datasets import LENGTH, SIDE, ClaimData, flip_and_shift
from bifocal.files import RUN, remove_folder, replace_file, replace_folder, write_json
from bifocal.modeling import BifocalConfig, BifocalModel, BifocalTextModel
from bifocal.training.arguments import BifocalTrainingArguments
from bifocal.training.checkpoints import last_complete_checkpoint, remove_checkpoints
from bifocal.training.mlm import train_mlm
from bifocal.training.recipe import Recipe
from bifocal.training.tasks import Task
from bifocal.training.trainer import MultiTaskTrainer

TEXT = dict(hidden_size=128, num_hidden_layers=2, num_attention_heads=4, intermediate_size=256,
            max_position_embeddings=512, hidden_dropout_prob=0.0, initializer_range=0.05)  # fmt: skip
IMAGE = dict(hidden_size=128, num_hidden_layers=3, num_attention_heads=4, intermediate_size=341, image_size=SIDE,
             patch_size=4, patch_dropout=0.0, rope_reference_grid=8, initializer_range=0.05)  # fmt: skip
Measure = Callable[[BifocalModel, ClaimData], dict[str, float]]


@dataclass(frozen=True)
class Phase:
    """A part of a training.

    Args:
        name: name of the phase.
        tasks: function that returns the tasks; None for masked language modelling of the texts.
        steps: number of steps at full budget; 0 measures the model without training.
        learning_rate: highest learning rate.
        max_length: tokens of a text.
        options: further training arguments.
        augment: function that augments an image; None for none.
        masked: batch size of masked language modelling.
        trainer: the trainer, where a claim is about what the trainer does.
    """

    name: str
    tasks: Callable[[ClaimData], Sequence[Task]] | None
    steps: int
    learning_rate: float = 1.5e-3
    max_length: int = LENGTH
    options: dict[str, Any] = field(default_factory=dict)
    augment: Callable[[Image.Image, random.Random], Image.Image] | None = flip_and_shift
    masked: int = 0
    trainer: type[MultiTaskTrainer] = MultiTaskTrainer


@dataclass(frozen=True)
class Condition:
    """A training that is compared with the other conditions of a claim.

    Args:
        name: name of the condition.
        phases: the training.
        measure: function that measures the model after each phase except masked language modelling.
        patch_size: patch size of the image tower; that of `IMAGE` if None.
        new_model: function that returns the model to start from; small towers without training if None.
    """

    name: str
    phases: Sequence[Phase]
    measure: Measure
    patch_size: int | None = None
    new_model: Callable[[ClaimData], BifocalModel] | None = None


def run_condition(
    condition: Condition, conditions: Sequence[Condition], seed: int, scale: float, data: ClaimData, folder: Path
) -> dict[str, dict[str, float]]:
    """Train a condition and return its metrics by phase. Finished phases are reused.

    Args:
        condition: the condition to train.
        conditions: all conditions of the claim. Conditions that start with the same phases share them, since their
            models would be identical.
        seed: seed of weights and batches.
        scale: factor of all steps.
        data: data of the claims.
        folder: folder of the claim and the seed, with a folder for each condition.
    """
    metrics_file = folder / file_name(condition.name) / "metrics.json"
    if metrics_file.exists():
        return json.loads(metrics_file.read_text(encoding="utf-8"))
    metrics_file.parent.mkdir(parents=True, exist_ok=True)
    by_phase: dict[str, dict[str, float]] = {}
    previous_model: Path | None = None
    for number, phase in enumerate(condition.phases, 1):
        owner = next(other for other in conditions if _share_phases(other, condition, number))
        phase_folder = folder / file_name(owner.name) / file_name(phase.name)
        done = phase_folder / "done.json"
        if not done.exists():
            started = time.monotonic()
            steps = max(8, round(phase.steps * scale)) if phase.steps else 0
            if phase.masked:
                _train_masked(phase, seed, steps, data, phase_folder)
                metrics: dict[str, float] = {}
            else:
                model = _initial_model(condition, seed, previous_model, data)
                if steps:
                    _train(phase, model, seed, steps, data, phase_folder)
                metrics = condition.measure(model, data)
                with replace_folder(phase_folder / "model", RUN) as scratch:
                    model.save_pretrained(scratch)
            remove_checkpoints(phase_folder)
            # For a run that was killed, the seconds are those of the last session.
            write_json(done, {"metrics": metrics, "steps": steps, "seconds": round(time.monotonic() - started, 1)})
        by_phase[phase.name] = json.loads(done.read_text(encoding="utf-8"))["metrics"]
        previous_model = phase_folder / "model"
    write_json(metrics_file, by_phase)
    return by_phase


def _share_phases(one: Condition, other: Condition, phases: int) -> bool:
    same = one.phases[:phases] == other.phases[:phases] and one.patch_size == other.patch_size
    return same and one.measure is other.measure and one.new_model is other.new_model


def remove_models(folder: Path) -> None:
    """Remove the models of a claim and seed that are finished."""
    for model in folder.glob("*/*/model"):
        remove_folder(model, RUN)


def file_name(name: str) -> str:
    """Return a name without spaces and commas."""
    return name.replace(" ", "-").replace(",", "")


def _initial_model(condition: Condition, seed: int, previous: Path | None, data: ClaimData) -> BifocalModel:
    """Return the model of the previous phase, or a new one, with the text tower of masked language modelling if any."""
    set_seed(seed)
    model = _small_model(condition, data) if condition.new_model is None else condition.new_model(data)
    if previous is not None:
        processor = model.processor
        architectures = json.loads((previous / "config.json").read_text(encoding="utf-8"))["architectures"]
        if architectures == ["BifocalModel"]:
            model = BifocalModel.from_pretrained(previous)
        else:
            model.text_model.load_state_dict(BifocalTextModel.from_pretrained(previous).state_dict())
        model.processor = processor
    return model


def _small_model(condition: Condition, data: ClaimData) -> BifocalModel:
    tokens = -(-len(data.processor.tokenizer) // 64) * 64
    image, patch = IMAGE, condition.patch_size
    if patch is not None:
        image = {**IMAGE, "patch_size": patch, "rope_reference_grid": SIDE // patch}
    config = BifocalConfig(text_config={**TEXT, "vocab_size": tokens}, vision_config=image, projection_dim=128)
    model = BifocalModel(config)
    model.processor = data.processor
    return model


def _train(phase: Phase, model: BifocalModel, seed: int, steps: int, data: ClaimData, folder: Path) -> None:
    assert phase.tasks is not None
    options = dict(
        learning_rate=phase.learning_rate, warmup_steps=max(1, steps // 10), lr_scheduler_type="cosine",
        adam_beta2=0.98, weight_decay=0.05, logging_steps=max(1, steps // 20), save_steps=max(20, steps // 4),
        save_total_limit=1, report_to="none", disable_tqdm=True, log_level="error",
    )  # fmt: skip
    args = BifocalTrainingArguments(output_dir=str(folder), max_steps=steps, seed=seed, **{**options, **phase.options})
    tasks = list(phase.tasks(data))
    trainer = phase.trainer(model, args, tasks, model.processor, phase.max_length, augment=phase.augment)
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    checkpoint = last_complete_checkpoint(folder)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))


def _train_masked(phase: Phase, seed: int, steps: int, data: ClaimData, folder: Path) -> None:
    """Train masked language modelling on the captions, with a recipe as users write it."""
    texts = data.out / "texts.jsonl"
    with data.lock:
        if not texts.exists():
            lines = [json.dumps({"text": text}) for captions in data.captions.train for text in captions]
            with replace_file(texts) as scratch:
                scratch.write_text("\n".join(lines) + "\n", encoding="utf-8")
    _ = data.processor  # so that it is saved
    recipe = Recipe.model_validate(
        {
            "name": "masked", "output_dir": str(folder), "seed": seed, "processor": str(data.out / "processor"),
            "model": TEXT, "max_length": phase.max_length,
            "mlm": {"data": {"path": str(texts)}, "batch_size": phase.masked},
            "training": {"max_steps": steps, "learning_rate": phase.learning_rate, "warmup_steps": max(1, steps // 10),
                         "save_steps": max(20, steps // 4), "disable_tqdm": True, "logging_steps": steps,
                         "bf16": False},
        }
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    train_mlm(recipe)
