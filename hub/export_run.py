"""`bifocal export`: gathers what a run's folder says about its model, and writes the release."""

import json
from dataclasses import replace
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from bifocal.errors import RecipeError, first_line
from bifocal.hub.export import read_card
from bifocal.hub.export_arguments import MAX_SHARD_SIZE, ExportError, check_export
from bifocal.hub.release import ReleaseContents, write_release
from bifocal.modeling import BifocalModel, load_image
from bifocal.progress import no_progress_bars

_EVAL_PAIRS = 256  # pairs on which the ONNX files are compared with torch


def export_run(
    run: Path,
    out: Path,
    repo_id: str | None = None,
    description: str | None = None,
    license: str | None = None,
    results: Path | None = None,
    onnx: bool = True,
    onnx_eval_data: str | None = None,
    max_shard_size: str = MAX_SHARD_SIZE,
) -> Path:
    """Write the release of a run's model and return its folder.

    Args:
        run: folder of a run or of a model.
        out: folder to write.
        repo_id: "organisation/name" of the repository, for the card's code.
        description, license: for the card; those of the model's card when None.
        results: `results.json` of `bifocal evaluate`, or its folder.
        onnx: whether to write ONNX files.
        onnx_eval_data: image-text source on which the ONNX files are compared with torch; sample drawings when None.
        max_shard_size: largest size of a weights file.

    Raises:
        ExportError: if an option is not valid, or `run` holds no model of texts and images.
        RecipeError: if the source cannot be read.
        OnnxError: if an ONNX file differs from torch.
        NotOursError: if `out` may not be replaced (`bifocal.files.require_replaceable`), or holds the exported model.
    """
    folder, evaluation = check_export(run, out, repo_id, results, onnx_eval_data, max_shard_size)
    measured = {task: entry for task, entry in (evaluation or {}).items() if entry["main"] in entry["metrics"]}
    try:
        with no_progress_bars():
            model = BifocalModel.from_pretrained(folder)
        _ = model.processor
    except (OSError, ValueError) as error:
        raise ExportError(f"The model in '{folder}' cannot be loaded ({first_line(error)}).") from error
    card = read_card(folder)
    card = replace(
        card,
        name=repo_id,
        description=description or card.description,
        license=license or card.license,
        metrics=card.metrics
        | {f"{task}: {entry['main']}": entry["metrics"][entry["main"]] for task, entry in measured.items()},
    )
    contents = ReleaseContents(
        recipes=_read_recipes(run),
        results=[(task, entry["kind"], entry["metrics"]) for task, entry in measured.items()],
        evaluation=evaluation,
        license_text=_license_text(card.license),
        onnx=onnx,
        onnx_eval_data=None if onnx_eval_data is None else _read_pairs(onnx_eval_data),
    )
    return write_release(model, out, card, contents, max_shard_size)


def _read_recipes(run: Path) -> dict[str, Any]:
    """Return the resolved recipes of a run and of the runs it started from, if their folders exist; or the demo's."""
    import yaml

    if (run / "settings.json").exists():
        settings = json.loads((run / "settings.json").read_text(encoding="utf-8"))
        return {stage: recipe for stage, recipe in settings.items() if stage.startswith("stage")}
    recipes: dict[str, Any] = {}
    folder: Path | None = run
    while folder is not None and (folder / "recipe.yaml").exists():
        recipe = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
        if recipe["name"] in recipes:
            break
        recipes[recipe["name"]] = recipe
        start = recipe.get("start_from")
        stage = start.get("stage") if isinstance(start, dict) else None
        folder = Path("runs") / stage if stage else Path(start).parent if isinstance(start, str) else None
    return recipes


def _read_pairs(path: str) -> tuple[list[str], list[Any], str]:
    """Return the first captions and images of an image-text source, and a name for them."""
    from bifocal.data.loading import load_source
    from bifocal.data.source import Source

    texts, images = [], []
    for row in load_source(Source(path=path, limit=_EVAL_PAIRS), "image-text"):
        images.append(load_image(row["image"]))
        texts.append(row["caption"] if isinstance(row["caption"], str) else row["caption"][0])
    if not texts:
        raise RecipeError(f"'{path}' has no image with a caption. Give another --onnx-eval-data.")
    return texts, images, f"pairs of {Path(path).name}"


def _license_text(name: str | None) -> str | None:
    """Return the text of the Apache licence, which this package contains; None for others."""
    if name != "apache-2.0":
        return None
    # In a checkout's root, the metadata of a build (*.egg-info) comes first and has no licence.
    names = ("licenses/LICENSE", "LICENSE")
    texts = (package.read_text(file) for package in distributions(name="bifocal") for file in names)
    return next(filter(None, texts), None)
