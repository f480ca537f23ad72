"""The main job in small: train on symbols through the three stages, evaluate, export, search and report."""

import json
import os
import shutil
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from bifocal.demo_results import evaluate_symbols, example_searches, searches_as_text, write_demo_report
from bifocal.evaluation.report import Stage
from bifocal.hub.export import Card, export_model
from bifocal.modeling import BifocalConfig, BifocalModel, BifocalProcessor
from bifocal.training.callbacks import StageProgress, Stopwatch
from bifocal.training.checkpoints import last_complete_checkpoint
from bifocal.training.data.symbols import SymbolsConfig, build_symbols, random_shift
from bifocal.training.tasks import Task
from bifocal.training.tokenizer import train_wordpiece
from bifocal.training.trainer import MultiTaskTrainer

TEXT_TEMPERATURE = 0.05
MAX_LENGTH = 96


@dataclass(frozen=True)
class StageSettings:
    """One stage of the recipe (arXiv 2405.20204, section 3) at the demo's size.

    Args:
        captions: "name" or "long_captions", what is paired with the pictures.
        texts: "text-pair" (name, description) or "text-triplet" (description, name, 7 confusable names).
        image_batch, text_batch: rows of each per step.
    """

    name: str
    title: str
    captions: str
    texts: str
    steps: int
    image_batch: int
    text_batch: int
    learning_rate: float


@dataclass(frozen=True)
class DemoSettings:
    """All that the demo's result is a function of."""

    data: SymbolsConfig
    width: int
    image_layers: int
    text_layers: int
    patch_size: int
    patch_dropout: float
    vocab_size: int
    stages: tuple[StageSettings, ...]
    seed: int = 0


def full_settings(seed: int) -> DemoSettings:
    """The demo as users run it: about six minutes on two cores."""
    return DemoSettings(
        data=SymbolsConfig(image_size=32, seed=seed),
        width=128, image_layers=3, text_layers=2, patch_size=8, patch_dropout=0.0, vocab_size=4000,
        stages=(
            StageSettings("stage1", "1: names + text pairs", "name", "text-pair", 550, 256, 32, 1.5e-3),
            StageSettings("stage2", "2: long captions + text pairs", "long_captions", "text-pair", 50, 128, 32, 4e-4),
            StageSettings("stage3", "3: triplets + long captions", "long_captions", "text-triplet", 40, 128, 32, 2e-4),
        ),
        seed=seed,
    )  # fmt: skip


def quick_settings(seed: int) -> DemoSettings:
    """The same path in seconds, for tests: too short to learn much."""
    full = full_settings(seed)
    short = {"stage1": 12, "stage2": 6, "stage3": 6}
    return replace(
        full,
        data=replace(full.data, limit=400, test_symbols=50, validation_symbols=50),
        width=64, image_layers=2, text_layers=1, vocab_size=1000,
        stages=tuple(
            replace(stage, steps=short[stage.name], image_batch=64, text_batch=16) for stage in full.stages
        ),
    )  # fmt: skip


class DemoError(Exception):
    """What stops the demo, in one sentence for the user."""


def run_demo(out: Path, settings: DemoSettings, force: bool = False) -> None:
    """Train, evaluate, export and report into `out`; go on from the last checkpoint if a run there was killed.

    Raises:
        DemoError: `out` holds something else or a run with other settings.
    """
    if not _open_run(out, settings, force):
        return
    started = time.time()
    _leave_progress_to_the_stages()
    symbols = build_symbols(settings.data)
    processor = _processor(out, settings, symbols["train"])
    model = _new_model(settings, len(processor.tokenizer))
    model.processor = processor
    stages = []
    for stage in settings.stages:
        result = _read_json(out / stage.name / "result.json")
        if result is None:
            result = _train_stage(out, settings, stage, model, processor, symbols)
        else:
            print(f"{stage.title} is done already.")
            model = _load_weights(model, out / stage.name / "model")
        stages.append(result)
        print(_metrics_line(stage, result["metrics"]))
    _finish(out, settings, model, processor, symbols["test"], stages, started)


def _leave_progress_to_the_stages() -> None:
    """One bar per stage; the libraries' own, for every small file they write, would tear it apart."""
    import datasets
    from transformers.utils import logging

    datasets.disable_progress_bars()
    logging.disable_progress_bar()


def _open_run(out: Path, settings: DemoSettings, force: bool) -> bool:
    """Claim the folder; False if a finished run is there already."""
    wanted = json.loads(json.dumps(asdict(settings)))
    found = _read_json(out / "settings.json")
    if out.exists() and not out.is_dir():
        raise DemoError(f"'{out}' is a file; choose another folder with --out.")
    if found is None and out.exists() and any(out.iterdir()):
        raise DemoError(f"'{out}' holds other files and no run of the demo; choose another folder with --out.")
    if found is not None and force:
        _clear(out, settings)
    elif found is not None and found != wanted:
        raise DemoError(
            f"'{out}' holds a run with other settings; choose another folder with --out, or start anew with --force."
        )
    elif (out / "results.json").exists():
        print(f"This run is finished; see {out / 'report.html'}. To train again, add --force.")
        return False
    _write_json(out / "settings.json", wanted)
    return True


def _processor(out: Path, settings: DemoSettings, train: Any) -> BifocalProcessor:
    """The tokenizer trained on the training texts with the image processor of the pictures' size."""
    from transformers.models.clip import CLIPImageProcessorPil

    folder = out / "processor"
    if (folder / "processor_config.json").exists():
        return BifocalProcessor.from_pretrained(folder)
    texts = list(train["name"])
    for column in ("long_captions", "descriptions"):
        texts += [text for wordings in train[column] for text in wordings]
    tokenizer = train_wordpiece(texts, settings.vocab_size, MAX_LENGTH)
    side = settings.data.image_size
    images = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    processor = BifocalProcessor(images, tokenizer)
    scratch = out / ".processor"
    processor.save_pretrained(scratch)
    os.replace(scratch, folder)
    return processor


def _new_model(settings: DemoSettings, tokens: int) -> BifocalModel:
    from transformers import set_seed

    set_seed(settings.seed)
    heads = settings.width // 32
    config = BifocalConfig(
        text_config={
            "vocab_size": -(-tokens // 64) * 64, "hidden_size": settings.width,
            "num_hidden_layers": settings.text_layers, "num_attention_heads": heads,
            "intermediate_size": 2 * settings.width, "max_position_embeddings": 512, "hidden_dropout_prob": 0.0,
            "initializer_range": 0.05,
        },
        vision_config={
            "hidden_size": settings.width, "num_hidden_layers": settings.image_layers, "num_attention_heads": heads,
            "intermediate_size": 8 * settings.width // 3, "image_size": settings.data.image_size,
            "patch_size": settings.patch_size, "patch_dropout": settings.patch_dropout,
            "rope_reference_grid": settings.data.image_size // settings.patch_size, "initializer_range": 0.05,
        },
        projection_dim=settings.width, initializer_range=0.05,
    )  # fmt: skip
    return BifocalModel(config)


def _tasks(stage: StageSettings, train: Any) -> list[Task]:
    """The two tasks of a stage, as views of the data set's columns."""
    from datasets import Image, List

    pictures = train.select_columns(["images", stage.captions]).cast_column("images", List(Image(decode=False)))
    pictures = pictures.rename_columns({"images": "image", stage.captions: "caption"})
    columns = {"name": "query", "descriptions": "positive"}
    if stage.texts == "text-triplet":  # the other way round: the hard negatives are names
        columns = {"descriptions": "query", "name": "positive", "negatives": "negatives"}
    texts = train.select_columns(list(columns))
    texts = texts.rename_columns({old: new for old, new in columns.items() if old != new})
    return [
        Task("image-text", "image-text", pictures, stage.image_batch),
        Task(stage.texts, stage.texts, texts, stage.text_batch, temperature=TEXT_TEMPERATURE),
    ]


def _train_stage(
    out: Path,
    settings: DemoSettings,
    stage: StageSettings,
    model: BifocalModel,
    processor: BifocalProcessor,
    symbols: Any,
) -> dict[str, Any]:
    """Train one stage from its last checkpoint, if there is one, and keep its weights and result."""
    from transformers import TrainingArguments
    from transformers.trainer_callback import ProgressCallback

    folder = out / stage.name
    checkpoint = last_complete_checkpoint(folder)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=stage.steps,
        learning_rate=stage.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, stage.steps // 10),
        adam_beta2=0.98,
        weight_decay=0.05,
        max_grad_norm=1.0,
        logging_steps=max(1, stage.steps // 20),
        save_steps=min(50, max(1, stage.steps // 3)),
        save_total_limit=2,
        seed=settings.seed,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        report_to="none",
        restore_callback_states_from_checkpoint=True,
    )
    watch = Stopwatch()
    trainer = MultiTaskTrainer(
        model=model,
        args=arguments,
        tasks=_tasks(stage, symbols["train"]),
        processor=processor,
        max_length=MAX_LENGTH,
        augment=random_shift,
        callbacks=[watch],
    )
    trainer.remove_callback(ProgressCallback)
    progress = StageProgress(f"Stage {stage.title}")
    trainer.add_callback(progress)
    if checkpoint is not None:
        print(f"Stage {stage.title} goes on from {checkpoint.name}.")
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    finally:
        progress.close()
    evaluation = evaluate_symbols(model, symbols["test"])
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    names = [name for name in logs[0] if name.startswith("loss/")]
    result = {
        "name": stage.title,
        "steps": stage.steps,
        "seconds": watch.seconds,
        "metrics": evaluation.metrics,
        "recall": evaluation.recall,
        "losses": {name.removeprefix("loss/"): [[entry["step"], entry[name]] for entry in logs] for name in names},
    }
    scratch = folder / ".model"
    model.save_pretrained(scratch)
    shutil.rmtree(folder / "model", ignore_errors=True)
    os.replace(scratch, folder / "model")
    _write_json(folder / "result.json", result)
    return result


def _finish(
    out: Path,
    settings: DemoSettings,
    model: BifocalModel,
    processor: BifocalProcessor,
    test: Any,
    stages: list[dict[str, Any]],
    started: float,
) -> None:
    """Export, load back, search and report."""
    folder = out / "model"
    last = stages[-1]["metrics"]
    card = Card(
        name="bifocal-symbols",
        description="A small Bifocal model of the symbols in the DejaVu fonts, made by `bifocal demo`.",
        metrics=last,
        protocol=f"Measured on {len(test)} symbols that training never saw in any face; R@k is Recall@k.",
        license="apache-2.0",
    )
    export_model(model, folder, processor, card)
    difference = _check_folder(folder, test)
    evaluation = evaluate_symbols(model, test)
    galleries = example_searches(evaluation, test, settings.seed)
    print(searches_as_text(galleries))
    seconds = sum(stage["seconds"] for stage in stages)
    figures = {
        "Recall@5, picture found by name": f"{last['text to picture R@5']:.2f}",
        "Recall@5, name found by picture": f"{last['picture to text R@5']:.2f}",
        "Recall@5, description found by name": f"{last['name to description R@5']:.2f}",
        "minutes of training": f"{seconds / 60:.1f}",
    }
    write_demo_report(
        out / "report.html", [Stage(**stage) for stage in stages], galleries, figures, _described(settings, model)
    )
    _write_json(out / "results.json", {"stages": stages, "seconds": seconds, "load difference": difference})
    print(
        f"\nAutoModel and SentenceTransformer load {folder} and agree to {difference:.1e}.\n"
        f"Report: {out / 'report.html'}\nThis run took {time.time() - started:.0f} s."
    )


def _check_folder(folder: Path, test: Any) -> float:
    """Load the exported folder in both ways and return the largest difference between their vectors."""
    from sentence_transformers import SentenceTransformer
    from transformers import AutoModel

    names = list(test["name"][:16])
    pictures = [images[0] for images in test["images"][:16]]
    model = AutoModel.from_pretrained(folder)
    sentences = SentenceTransformer(str(folder), device="cpu")
    return max(
        float(abs(model.encode_text(names) - sentences.encode(names)).max()),
        float(abs(model.encode_image(pictures) - sentences.encode(pictures)).max()),
    )


def _described(settings: DemoSettings, model: BifocalModel) -> dict[str, str]:
    import sys

    import torch
    import transformers

    described = {
        "parameters": f"{sum(parameter.numel() for parameter in model.parameters()):,}",
        "towers": f"width {settings.width}, {settings.image_layers} image and {settings.text_layers} text layers",
        "pictures": f"{settings.data.image_size} x {settings.data.image_size} pixels, patches of {settings.patch_size}",
    }
    for stage in settings.stages:
        described[f"stage {stage.title}"] = (
            f"{stage.steps} steps of {stage.image_batch} pictures and {stage.text_batch} text rows, learning rate "
            f"{stage.learning_rate:g}"
        )
    described["seed"] = str(settings.seed)
    described["versions"] = (
        f"Python {sys.version.split()[0]}, torch {torch.__version__}, transformers {transformers.__version__}"
    )
    return described


def _metrics_line(stage: StageSettings, metrics: dict[str, float]) -> str:
    shown = ", ".join(f"{name} {metrics[name]:.3f}" for name in metrics if name.endswith("R@5"))
    return f"After stage {stage.title}: {shown}"


def _load_weights(model: BifocalModel, folder: Path) -> BifocalModel:
    loaded = BifocalModel.from_pretrained(folder)
    loaded.processor = model.processor
    return loaded


def _clear(out: Path, settings: DemoSettings) -> None:
    """Remove what a run of the demo makes, and nothing else."""
    for name in ("processor", ".processor", "model", *(stage.name for stage in settings.stages)):
        shutil.rmtree(out / name, ignore_errors=True)
    for name in ("settings.json", "results.json", "report.html"):
        (out / name).unlink(missing_ok=True)


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _write_json(path: Path, value: Any) -> None:
    """Write whole or not at all: a run may be killed at any moment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}")
    scratch.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    os.replace(scratch, path)
