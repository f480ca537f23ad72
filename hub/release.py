"""All that a published model should have in one folder: also ONNX, examples, recipes, results, plots, a licence."""

import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors.numpy import save_file

from bifocal.files import MODEL, replace_folder
from bifocal.hub.card import Card
from bifocal.hub.card_results import add_results
from bifocal.hub.export import SHARD, with_limit, write_model
from bifocal.hub.onnx import quietly
from bifocal.hub.sample_images import long_text, samples
from bifocal.modeling import BifocalModel

EXAMPLES = 4  # samples that travel with the model
VECTORS = "examples/vectors.safetensors"
INPUTS = "examples/inputs.json"


@dataclass
class Extras:
    """What a release has beside the model itself.

    Args:
        recipes: resolved, by stage.
        results: (data set, protocol, metrics by name; see `add_results`), for the card's `model-index`.
        evaluation: the same with all that was measured, for `evaluation.json`.
        draw: makes plots into a folder and returns what each file there shows.
        measured_on: texts, the pictures they describe and what they are; the samples when None.
        licence: its text.
        onnx: also write ONNX files.
    """

    recipes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    results: Sequence[tuple[str, str, Mapping[str, float]]] = ()
    evaluation: Mapping[str, Any] | None = None
    draw: Callable[[Path], dict[str, str]] | None = None
    measured_on: tuple[Sequence[str], Sequence[Any], str] | None = None
    licence: str | None = None
    onnx: bool = True


def release(model: BifocalModel, out: Path, card: Card, extras: Extras, shard: str = SHARD) -> Path:
    """Write a complete folder, whole or not at all; an earlier model there that nobody changed is replaced.

    Args:
        model: with its processor.

    Returns:
        The folder.

    Raises:
        NotOursError: if `out` may not be replaced (`bifocal.files.require_replaceable`).
        OnnxError: if an ONNX file differs from torch.
    """
    with replace_folder(out, MODEL) as made:
        scratch = Path(tempfile.mkdtemp(dir=made.parent))  # what is measured before the model is written
        plots = {}
        if extras.draw is not None:
            (scratch / "plots").mkdir()
            plots = {f"plots/{file}": shown for file, shown in extras.draw(scratch / "plots").items()}
        facts = None
        if extras.onnx:
            from bifocal.hub.onnx import export_onnx, measure

            export_onnx(model, scratch / "onnx")
            pairs = list(samples())
            drawings = ([text for text, _ in pairs], [picture for _, picture in pairs], "drawings of coloured shapes")
            facts = measure(model, scratch / "onnx", *(extras.measured_on or drawings))
        card = replace(card, name=card.name or out.name, plots=plots, onnx=facts)
        write_model(model, made, model.processor, card, shard)
        for folder in ("onnx", "plots"):
            if (scratch / folder).exists():
                os.replace(scratch / folder, made / folder)
        _write_examples(model, made)
        _write_recipes(extras.recipes, made / "recipes")
        if extras.evaluation is not None:
            (made / "evaluation.json").write_text(json.dumps(extras.evaluation, indent=2) + "\n", encoding="utf-8")
        if extras.licence is not None:
            (made / "LICENSE").write_text(extras.licence, encoding="utf-8")
        if extras.results:
            add_results(made, extras.results)
    return out


def _write_examples(model: BifocalModel, folder: Path) -> None:
    """A few samples with the vectors this model makes of them, by which a copy can be checked."""
    chosen = list(samples())[:EXAMPLES]
    (folder / "examples").mkdir()
    listed: list[dict[str, Any]] = []
    for number, (text, picture) in enumerate(chosen):
        picture.save(folder / "examples" / f"{number}.png")
        listed.append({"text": text, "image": f"examples/{number}.png"})
    limit = with_limit(model.processor, model).tokenizer.model_max_length
    listed += [{"text": long_text(limit), "tokens": limit}, {"text": ""}]
    (folder / INPUTS).write_text(json.dumps(listed, indent=2) + "\n", encoding="utf-8")
    with quietly():  # one text is too long, and one empty, on purpose
        texts = model.encode_text([entry["text"] for entry in listed])
    images = model.encode_image([folder / entry["image"] for entry in listed if "image" in entry])
    save_file({"text": texts, "image": images}, folder / VECTORS)


def _write_recipes(recipes: Mapping[str, Mapping[str, Any]], folder: Path) -> None:
    import yaml

    for name, recipe in recipes.items():
        folder.mkdir(exist_ok=True)
        text = yaml.safe_dump(_public(recipe), sort_keys=False, allow_unicode=True)
        head = "# As it was run; of paths on the machine it ran on only the last part is kept.\n"
        (folder / f"{name}.yaml").write_text(head + text, encoding="utf-8")


def _public(value: Any) -> Any:
    """The same without paths that tell of a machine."""
    if isinstance(value, Mapping):
        return {key: _public(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_public(inner) for inner in value]
    if isinstance(value, str) and (os.path.isabs(value) or value.startswith("~")):
        return Path(value).name
    return value
