"""The demo: three recipes on symbols, run one after the other, then evaluation, export, searches and a report."""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from transformers.utils import logging

from bifocal.data.kinds import COLUMNS
from bifocal.data.loading import with_columns
from bifocal.data.symbols import SymbolsConfig, build_symbols
from bifocal.demo.report import Stage
from bifocal.demo.results import evaluate_symbols, example_searches, searches_as_text, write_demo_report
from bifocal.demo.run_folder import DemoError, earlier_settings
from bifocal.files import (
    RUN,
    overwrite,
    replace_folder,
    require_overwritable,
    require_replaceable,
    write_json,
)
from bifocal.hub.card import Card, TrainedStage
from bifocal.hub.export import export_model
from bifocal.modeling import BifocalModel, BifocalProcessor
from bifocal.modeling.processing_bifocal import image_processor_of_size
from bifocal.training.callbacks.progress import StageProgress
from bifocal.training.checkpoints import clear_run, require_clearable
from bifocal.training.recipe import Recipe, find_recipe, load_recipe
from bifocal.training.runner import RUN_FILES, open_run, run_recipe
from bifocal.training.stage_record import STAGE
from bifocal.training.tokenizer import train_wordpiece

STAGES = {
    "stage1": "1: names + text pairs",
    "stage2": "2: long captions + text pairs",
    "stage3": "3: triplets + long captions",
}

RESULT = "result.json"  # of a stage: its metrics and losses


@dataclass(frozen=True)
class DemoSettings:
    """Everything that determines the demo's result besides the recipes of its stages.

    Args:
        data: settings of the symbols.
        vocab_size: size of the vocabulary of its tokenizer.
        overrides: overrides of the recipe of each stage.
        seed: random seed of the split, the weights and the order of the batches.
    """

    data: SymbolsConfig
    vocab_size: int
    overrides: dict[str, list[str]]
    seed: int = 0

    def recipe(self, stage: str, out: Path) -> Recipe:
        """Return the recipe of a stage (training/recipes/demo) with its folders in this run."""
        start = [] if stage == "stage1" else [f"start_from={out / f'stage{int(stage[-1]) - 1}' / 'model'}"]
        in_this_run = [
            f"output_dir={out / stage}",
            f"processor={out / 'processor'}",
            f"seed={self.seed}",
            "tokenizer_vocab_size=null",
        ]
        return load_recipe(find_recipe(f"demo/{stage}"), [*in_this_run, *start, *self.overrides.get(stage, [])])


def full_settings(seed: int) -> DemoSettings:
    """Return the settings of the demo as users run it: about five minutes on two cores."""
    return DemoSettings(SymbolsConfig(image_size=32, seed=seed), 4000, {}, seed)


def quick_settings(seed: int) -> DemoSettings:
    """Return settings for the same steps in seconds: too short to learn much."""
    small = [
        "model.projection_dim=64", "model.text_config.hidden_size=64", "model.text_config.num_attention_heads=2",
        "model.text_config.intermediate_size=128", "model.text_config.num_hidden_layers=1",
        "model.vision_config.hidden_size=64", "model.vision_config.num_attention_heads=2",
        "model.vision_config.intermediate_size=170", "model.vision_config.num_hidden_layers=2",
    ]  # fmt: skip

    def short(text_task: str, steps: int) -> list[str]:
        return [
            f"training.max_steps={steps}", "training.warmup_steps=1", "training.logging_steps=1",
            f"training.save_steps={steps // 3}", "tasks.image-text.batch_size=64", f"tasks.{text_task}.batch_size=16",
        ]  # fmt: skip

    full = full_settings(seed)
    return replace(
        full,
        data=replace(full.data, limit=400, test_symbols=50, validation_symbols=50),
        vocab_size=1000,
        overrides={
            "stage1": [*small, *short("text-pair", 12)],
            "stage2": short("text-pair", 6),
            "stage3": short("text-triplet", 6),
        },
    )


def run_demo(out: Path, settings: DemoSettings, overwrite_run: bool = False) -> None:
    """Train, evaluate, export and report into `out`; resume from the last checkpoint if a run there was killed.

    Args:
        overwrite_run: remove an earlier run in `out`.

    Raises:
        DemoError: if `out` holds something else or a run with other settings.
        NotOursError: if a file of the run was changed, or is not the run's.
    """
    if not _open_run(out, settings, overwrite_run):
        return
    started = time.time()
    _leave_progress_to_the_stages()
    symbols = build_symbols(settings.data)
    processor = _processor(out, settings, symbols["train"])
    stages = []
    for stage, title in STAGES.items():
        result = _run_stage(settings.recipe(stage, out), title, symbols)
        stages.append(result)
        print(_metrics_line(title, result["metrics"]))
    model = BifocalModel.from_pretrained(out / "stage3" / "model")
    model.processor = processor
    _finish(out, settings, model, processor, symbols["test"], stages, started)


def _leave_progress_to_the_stages() -> None:
    """Turn off the libraries' progress bars for every small file, which would break up the one bar per stage."""
    datasets.disable_progress_bars()
    logging.disable_progress_bar()


def _open_run(out: Path, settings: DemoSettings, overwrite_run: bool) -> bool:
    """Claim the folder; return False if it holds a finished run."""
    recipes = {stage: json.loads(settings.recipe(stage, Path()).model_dump_json()) for stage in STAGES}
    wanted = json.loads(json.dumps({"data": asdict(settings.data), "vocab_size": settings.vocab_size} | recipes))
    earlier = earlier_settings(out)
    if earlier is not None and overwrite_run:
        _clear(out, settings)
    elif earlier is not None and earlier != wanted:
        raise DemoError(
            f"'{out}' holds a run with other settings. Choose another folder with --out, or add --overwrite."
        )
    elif (out / "results.json").exists():
        print(f"This run is finished; see {out / 'report.html'}. To train again, add --overwrite.")
        return False
    require_replaceable(out / "model", RUN)  # now, and not after the training
    for name in ("report.html", "results.json"):
        require_overwritable(out / name, RUN)
    if earlier is None or overwrite_run:
        with overwrite(out / "settings.json", RUN) as scratch:
            write_json(scratch, wanted)
    return True


def _processor(out: Path, settings: DemoSettings, train: Any) -> BifocalProcessor:
    """Return a tokenizer trained on all training texts with the image processor of the images' size."""
    folder = out / "processor"
    if (folder / "processor_config.json").exists():
        return BifocalProcessor.from_pretrained(folder)
    max_length = settings.recipe("stage1", out).max_length
    texts = list(train["name"])
    for column in ("long_captions", "descriptions"):
        texts += [text for wordings in train[column] for text in wordings]
    tokenizer = train_wordpiece(texts, settings.vocab_size, max_length)
    processor = BifocalProcessor(image_processor_of_size(settings.data.image_size), tokenizer)
    with replace_folder(folder, RUN) as scratch:
        processor.save_pretrained(scratch)
    return processor


def _from(train: Any) -> Callable[..., Any]:
    """Return a function that reads the sources of the demo's recipes from the symbols."""
    return lambda source, kind, *_: with_columns(train, source, COLUMNS[kind])


def _run_stage(recipe: Recipe, title: str, symbols: Any) -> dict[str, Any]:
    """Run the recipe of a stage, if it is not finished, and return its result."""
    result = recipe.folder / RESULT

    def write_result(model: BifocalModel) -> None:
        evaluation = evaluate_symbols(model, symbols["test"])
        stage = _read_json(recipe.folder / STAGE)
        values = {"name": title, "steps": stage["steps"], "seconds": stage["seconds"], "losses": stage["curves"]}
        with overwrite(result, RUN) as scratch:
            write_json(scratch, values | {"metrics": evaluation.metrics, "recall": evaluation.recall})

    def save(model: BifocalModel, processor: BifocalProcessor, folder: Path) -> None:
        write_result(model)
        with replace_folder(folder, RUN) as scratch:  # the run is finished as soon as this is there
            model.save_pretrained(scratch)

    load = _from(symbols["train"])
    if run_recipe(recipe, save, load=load, progress=StageProgress(f"Stage {title}")) is None:
        print(f"Stage {title} is finished already.")
        if not result.exists():  # somebody deleted it
            model = BifocalModel.from_pretrained(recipe.folder / "model")
            model.processor = BifocalProcessor.from_pretrained(str(recipe.processor))
            write_result(model)
    return _read_json(result)


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
        stages=[TrainedStage(**_read_json(out / stage / STAGE)) for stage in STAGES],
    )
    export_model(model, folder, processor, card, kind=RUN)
    difference = _check_folder(folder, test)
    evaluation = evaluate_symbols(model, test)
    galleries = example_searches(evaluation, test, settings.seed)
    print(searches_as_text(galleries))
    seconds = sum(stage["seconds"] for stage in stages)
    figures = {
        "Recall@5, image found by name": f"{last['text to image R@5']:.2f}",
        "Recall@5, name found by image": f"{last['image to text R@5']:.2f}",
        "Recall@5, description found by name": f"{last['name to description R@5']:.2f}",
        "minutes of training": f"{seconds / 60:.1f}",
    }
    write_demo_report(
        out / "report.html", [Stage(**stage) for stage in stages], galleries, figures, _described(settings, out, model)
    )
    with overwrite(out / "results.json", RUN) as scratch:
        write_json(scratch, {"stages": stages, "seconds": seconds, "load difference": difference})
    print(
        f"\nAutoModel and SentenceTransformer load {folder} and agree to {difference:.1e}.\n"
        f"Report: {out / 'report.html'}\nThis run took {time.time() - started:.0f} s."
    )


def _check_folder(folder: Path, test: Any) -> float:
    """Load the exported folder in both ways and return the largest difference between their vectors."""
    from sentence_transformers import SentenceTransformer

    names = list(test["name"][:16])
    first_images = [images[0] for images in test["images"][:16]]
    model = transformers.AutoModel.from_pretrained(folder)
    sentences = SentenceTransformer(str(folder), device="cpu")
    return max(
        float(abs(model.encode_text(names) - sentences.encode(names)).max()),
        float(abs(model.encode_image(first_images) - sentences.encode(first_images)).max()),
    )


def _described(settings: DemoSettings, out: Path, model: BifocalModel) -> dict[str, str]:
    described = {
        "parameters": f"{sum(parameter.numel() for parameter in model.parameters()):,}",
        "towers": f"width {model.config.projection_dim}, {model.config.vision_config.num_hidden_layers} image and "
        f"{model.config.text_config.num_hidden_layers} text layers",
        "images": f"{model.config.vision_config.image_size} pixels wide and high, patches of "
        f"{model.config.vision_config.patch_size}",
    }
    for stage, title in STAGES.items():
        recipe = settings.recipe(stage, out)
        batches = " and ".join(f"{task.batch_size} rows of {task.name}" for task in recipe.tasks)
        described[f"stage {title}"] = (
            f"{recipe.training['max_steps']} steps of {batches}, learning rate {recipe.training['learning_rate']:g}"
        )
    described["seed"] = str(settings.seed)
    described["versions"] = (
        f"Python {sys.version.split()[0]}, torch {torch.__version__}, transformers {transformers.__version__}"
    )
    return described


def _metrics_line(title: str, metrics: dict[str, float]) -> str:
    shown = ", ".join(f"{name} {metrics[name]:.3f}" for name in metrics if name.endswith("R@5"))
    return f"After stage {title}: {shown}"


def _clear(out: Path, settings: DemoSettings) -> None:
    """Remove the files of a run of the demo, and nothing else; its stages' folders are claimed for the new run.

    Raises:
        NotOursError: if one of them was changed or is not the run's; then nothing is removed.
    """
    files = ("settings.json", "results.json", "report.html")
    require_clearable(out, *files)
    for stage in STAGES:
        require_clearable(out / stage, *RUN_FILES, RESULT)
    for stage in STAGES:
        clear_run(out / stage, RESULT)
        open_run(settings.recipe(stage, out), overwrite=True)
    clear_run(out, *files)


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
