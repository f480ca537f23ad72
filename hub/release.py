"""Writes a release: the model with ONNX files, examples, recipes, results, a plot of the losses and a licence."""

import copy
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.numpy import save_file

from bifocal.files import MODEL, replace_folder
from bifocal.hub.card import Card, TrainedStage
from bifocal.hub.card_results import add_results
from bifocal.hub.export import with_model_max_length, write_model
from bifocal.hub.export_arguments import MAX_SHARD_SIZE
from bifocal.hub.onnx import compare_with_torch, export_onnx, quietly
from bifocal.hub.sample_images import long_text, sample_pairs
from bifocal.modeling import BifocalModel
from bifocal.pages import COLOURS, new_figure

EXAMPLES = 4  # sample pairs that a release contains
VECTORS = "examples/vectors.safetensors"
INPUTS = "examples/inputs.json"


@dataclass
class ReleaseContents:
    """The parts of a release besides the model and its card.

    Args:
        recipes: resolved recipe of each stage by its name.
        results: (data set, protocol, metrics by name; see `add_results`) for the card's `model-index`.
        evaluation: content of `evaluation.json`.
        license_text: content of `LICENSE`.
        onnx: whether to write ONNX files.
        onnx_eval_data: texts, the images that they describe and a name of this data, on which the ONNX files are
            compared with torch; sample drawings when None.
    """

    recipes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    results: Sequence[tuple[str, str, Mapping[str, float]]] = ()
    evaluation: Mapping[str, Any] | None = None
    license_text: str | None = None
    onnx: bool = True
    onnx_eval_data: tuple[Sequence[str], Sequence[Any], str] | None = None


def write_release(
    model: BifocalModel, out: Path, card: Card, contents: ReleaseContents, max_shard_size: str = MAX_SHARD_SIZE
) -> Path:
    """Write a release whole or not at all, replace an unchanged earlier one, and return its folder.

    Args:
        model: the model, with its processor.
        out: folder to write.
        card: content of the model card.
        contents: what else the folder gets.
        max_shard_size: largest size of a weights file.

    Raises:
        NotOursError: if `out` may not be replaced (`bifocal.files.require_replaceable`).
        OnnxError: if an ONNX file differs from torch.
    """
    with replace_folder(out, MODEL) as folder:
        scratch = Path(
            tempfile.mkdtemp(dir=folder.parent)
        )  # the card needs plots and figures before the model is saved
        plots = _plot_losses(card.stages, scratch / "plots")
        comparison = None
        if contents.onnx:
            single = model
            if any(parameter.dtype != torch.float32 for parameter in model.parameters()):
                single = copy.deepcopy(model).float()  # ONNX Runtime has no kernels for all steps in 16 bits
            export_onnx(single, scratch / "onnx")
            texts, images = zip(*sample_pairs())
            drawings = (texts, images, "drawings of coloured shapes")
            comparison = compare_with_torch(single, scratch / "onnx", *(contents.onnx_eval_data or drawings))
        card = replace(card, name=card.name or out.name, plots=plots, onnx=comparison)
        write_model(model, folder, model.processor, card, max_shard_size)
        for part in ("onnx", "plots"):
            if (scratch / part).exists():
                os.replace(scratch / part, folder / part)
        _write_examples(model, folder)
        _write_recipes(contents.recipes, folder / "recipes")
        if contents.evaluation is not None:
            text = json.dumps(contents.evaluation, indent=2) + "\n"
            (folder / "evaluation.json").write_text(text, encoding="utf-8")
        if contents.license_text is not None:
            (folder / "LICENSE").write_text(contents.license_text, encoding="utf-8")
        if contents.results:
            add_results(folder, contents.results)
    return out


def _plot_losses(stages: Sequence[TrainedStage], folder: Path) -> dict[str, str]:
    """Plot the losses of all stages one after the other; return each plot's caption by its path in the release."""
    if not any(stage.curves for stage in stages):
        return {}
    figure, axes = new_figure()
    colours: dict[str, str] = {}
    first_step = 0
    for stage in stages:
        for task, curve in stage.curves.items():
            colour = colours.setdefault(task, COLOURS[len(colours) % len(COLOURS)])
            label = None if task in axes.get_legend_handles_labels()[1] else task
            axes.plot([first_step + step for step, _ in curve], [loss for _, loss in curve], color=colour, label=label)
        first_step += stage.steps
        if stage is not stages[-1]:
            axes.axvline(first_step, color="#999999", linewidth=0.8, linestyle=":")
    axes.set_xlabel("step, stages one after the other")
    axes.set_ylabel("loss")
    axes.legend(frameon=False)
    folder.mkdir()
    figure.savefig(folder / "losses.png", dpi=150)
    return {"plots/losses.png": f"Losses of the tasks in {len(stages)} stage{'s' * (len(stages) > 1)}"}


def _write_examples(model: BifocalModel, folder: Path) -> None:
    """Write sample inputs with the model's vectors, with which a copy of the model can be checked."""
    (folder / "examples").mkdir()
    inputs: list[dict[str, Any]] = []
    for number, (text, image) in enumerate(list(sample_pairs())[:EXAMPLES]):
        image.save(folder / "examples" / f"{number}.png")
        inputs.append({"text": text, "image": f"examples/{number}.png"})
    limit = with_model_max_length(model.processor, model).tokenizer.model_max_length
    inputs += [{"text": long_text(limit), "tokens": limit}, {"text": ""}]
    (folder / INPUTS).write_text(json.dumps(inputs, indent=2) + "\n", encoding="utf-8")
    with quietly():  # one text is too long and one is empty on purpose
        texts = model.encode_text([entry["text"] for entry in inputs])
    images = model.encode_image([folder / entry["image"] for entry in inputs if "image" in entry])
    save_file({"text": texts, "image": images}, folder / VECTORS)


def _write_recipes(recipes: Mapping[str, Mapping[str, Any]], folder: Path) -> None:
    import yaml

    for name, recipe in recipes.items():
        folder.mkdir(exist_ok=True)
        text = yaml.safe_dump(_without_local_folders(recipe), sort_keys=False, allow_unicode=True)
        head = "# As it was run. Of each local path, only the last part is kept.\n"
        (folder / f"{name}.yaml").write_text(head + text, encoding="utf-8")


def _without_local_folders(value: Any) -> Any:
    """Return the value with every absolute path shortened to its last part."""
    if isinstance(value, Mapping):
        return {key: _without_local_folders(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_local_folders(inner) for inner in value]
    if isinstance(value, str) and (os.path.isabs(value) or value.startswith("~")):
        return Path(value).name
    return value
