"""`bifocal export`: from a run's folder, and what was measured of its model, to a complete folder for the Hub."""

import json
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from bifocal.data.source import Source
from bifocal.errors import BifocalError, RecipeError, first_line
from bifocal.files import MODEL, NotOursError, require_replaceable
from bifocal.hub.card import Card
from bifocal.hub.export import SHARD, read_facts, require_size
from bifocal.hub.release import Extras, release
from bifocal.modeling import BifocalModel
from bifocal.progress import no_progress_bars

_MEASURED = 256  # pairs on which the ONNX files are compared


class ReleaseError(BifocalError):
    """Why a run cannot be exported, in one sentence."""


def release_run(
    run: Path,
    out: Path,
    name: str | None = None,
    description: str | None = None,
    license: str | None = None,
    results: Path | None = None,
    examples: str | None = None,
    onnx: bool = True,
    shard: str = SHARD,
) -> Path:
    """Write a complete folder.

    Args:
        run: folder of a run or of a model.
        name: the repository it is meant for, "organisation/model".
        description, license: for the card; those of the model's own card when None.
        results: `results.json` of `bifocal evaluate`, or its folder.
        examples: an image-text source on which the int8 files are measured; drawings when None.

    Raises:
        ReleaseError: if the size or the name is none, or `run` holds no Bifocal model.
        RecipeError: if the examples cannot be read.
        OnnxError: if an ONNX file differs from torch.
        NotOursError: if `out` may not be replaced (`bifocal.files.require_replaceable`), or is what is exported.
    """
    _require_options(name, shard)
    folder = run / "model" if (run / "model" / "config.json").exists() else run
    if not (folder / "config.json").exists():
        raise ReleaseError(f"'{run}' holds no model; give the folder of a finished run, or a model's.")
    _require_apart(out, run, folder)
    require_replaceable(out, MODEL)
    kind = _model_type(folder)
    if kind != "bifocal":
        raise ReleaseError(
            f"'{folder}' holds a {kind} model; this command writes Bifocal models with both towers, and "
            "bifocal.export_model in Python also CLIP and SigLIP."
        )
    measured, evaluation = _evaluation(results, folder)
    try:
        with no_progress_bars():
            model = BifocalModel.from_pretrained(folder)
        _ = model.processor
    except (OSError, ValueError) as error:
        raise ReleaseError(f"The model in '{folder}' cannot be loaded ({first_line(error)}).") from error
    card = read_facts(folder)
    card = replace(
        card,
        name=name,
        description=description or card.description,
        license=license or card.license,
        metrics=card.metrics
        | {f"{task}: {found['main']}": found["metrics"][found["main"]] for task, found in measured},
    )
    extras = Extras(
        recipes=_recipes(run),
        results=[(task, found["kind"], found["metrics"]) for task, found in measured],
        evaluation=evaluation,
        draw=(lambda place: _draw(card, place)) if any(stage.curves for stage in card.stages) else None,
        measured_on=None if examples is None else _pairs(examples),
        licence=_licence(card.license),
        onnx=onnx,
    )
    return release(model, out, card, extras, shard)


def _require_options(name: str | None, shard: str) -> None:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        require_size(shard)
        validate_repo_id(name)  # None means that there is no name yet
    except HFValidationError as error:
        raise ReleaseError(
            f"'{name}' is no name of a repository; write organisation/name with letters, digits, '-', '_' and '.'."
        ) from error
    except ValueError as error:
        raise ReleaseError(str(error)) from error


def _require_apart(out: Path, run: Path, model: Path) -> None:
    """
    Raises:
        NotOursError: if an export into `out` would touch what is exported. Beside the model, in the run's folder, it
            may be.
    """
    place = out.expanduser().resolve()
    for source in (run.resolve(), model.resolve()):
        if source.is_relative_to(place):
            raise NotOursError(f"'{out}' is or holds what is to be exported; choose another folder.")
    if place.is_relative_to(model.resolve()):
        raise NotOursError(f"'{out}' lies in the model that is to be exported; choose another folder.")


def _model_type(folder: Path) -> str:
    try:
        return str(json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ReleaseError(f"'{folder / 'config.json'}' is no configuration of a model.") from error


def _recipes(run: Path) -> dict[str, Any]:
    """The resolved recipes of a run and of those it began with, as far as their folders are here; or the demo's."""
    import yaml

    if (run / "settings.json").exists():
        found = json.loads((run / "settings.json").read_text(encoding="utf-8"))
        return {stage: recipe for stage, recipe in found.items() if stage.startswith("stage")}
    recipes: dict[str, Any] = {}
    place: Path | None = run
    while place is not None and (place / "recipe.yaml").exists():
        recipe = yaml.safe_load((place / "recipe.yaml").read_text(encoding="utf-8"))
        if recipe["name"] in recipes:
            break
        recipes[recipe["name"]] = recipe
        start = recipe.get("start_from")
        stage = start.get("stage") if isinstance(start, dict) else None
        before = Path("runs") / stage if stage else Path(start).parent if isinstance(start, str) else None
        place = before
    return recipes


def _evaluation(results: Path | None, folder: Path) -> tuple[list[tuple[str, Any]], dict[str, Any] | None]:
    """What `bifocal evaluate` found of the model, by task."""
    if results is None:
        return [], None
    path = results / "results.json" if results.is_dir() else results
    try:
        by_model = json.loads(path.read_text(encoding="utf-8"))
        named = {name: found for name, found in by_model.items() if Path(name).resolve() == folder.resolve()}
        if not named and len(by_model) == 1:
            named = by_model
        found = next(iter(named.values()))
        tasks = [(task, entry) for task, entry in found.items() if entry["main"] in entry["metrics"]]
    except StopIteration:
        raise ReleaseError(
            f"'{path}' has results of {', '.join(by_model)}, but not of '{folder}'; evaluate that model first."
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ReleaseError(f"'{path}' is no results.json of bifocal evaluate ({error}).") from error
    return tasks, found


def _pairs(path: str) -> tuple[list[str], list[Any], str]:
    """Captions and their pictures, the first of a source."""
    from bifocal.data.loading import load_source
    from bifocal.modeling import load_image

    rows = load_source(Source(path=path, limit=_MEASURED), "image-text")
    texts, pictures = [], []
    for row in rows:
        picture = row["image"]
        content = picture.get("bytes") or picture["path"] if isinstance(picture, dict) else picture
        pictures.append(load_image(content))
        texts.append(row["caption"] if isinstance(row["caption"], str) else row["caption"][0])
    if not texts:
        raise RecipeError(f"'{path}' has no picture with a caption to measure on.")
    return texts, pictures, f"pairs of {Path(path).name}"


def _draw(card: Card, folder: Path) -> dict[str, str]:
    """The losses of all stages, one after the other."""
    from bifocal.pages import COLOURS, new_figure

    figure, axes = new_figure()
    colours: dict[str, str] = {}
    before = 0
    for stage in card.stages:
        for task, curve in stage.curves.items():
            colour = colours.setdefault(task, COLOURS[len(colours) % len(COLOURS)])
            label = None if task in axes.get_legend_handles_labels()[1] else task
            axes.plot([before + step for step, _ in curve], [loss for _, loss in curve], color=colour, label=label)
        before += stage.steps
        if stage is not card.stages[-1]:
            axes.axvline(before, color="#999999", linewidth=0.8, linestyle=":")
    axes.set_xlabel("step, stages one after the other")
    axes.set_ylabel("loss")
    axes.legend(frameon=False)
    figure.savefig(folder / "losses.png", dpi=150)
    return {"losses.png": f"Losses of the tasks in {len(card.stages)} stage{'s' * (len(card.stages) > 1)}"}


def _licence(name: str | None) -> str | None:
    """The text of the Apache licence, which this package carries; of others only the name is known."""
    if name != "apache-2.0":
        return None
    try:
        found = distribution("bifocal")
    except PackageNotFoundError:
        return None
    return found.read_text("licenses/LICENSE") or found.read_text("LICENSE")
