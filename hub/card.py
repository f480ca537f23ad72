"""The model card: description, code, training, figures and limits of a model."""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bifocal.data.images import output_size
from bifocal.hub.tower_facts import ignores_case, tower_facts


@dataclass
class TrainedStage:
    """The record of one stage of training.

    Args:
        name: name of the recipe.
        start: initial weights: "nothing", a Hub id or the name of the earlier stage.
        steps: optimizer steps.
        max_length: longest text in tokens.
        learning_rate: peak learning rate.
        tasks: for each task its `name`, `kind`, `source`, `rows` (None for a stream), `batch_size` (over all
            processes), `loss`, `loss_weight` and `share` of the image or text batches.
        losses: last logged loss of each task.
        curves: (step, loss) pairs of each task.
        seconds: training time, summed over all runs of the stage.
        processes: number of processes.
        device: name of the device of each process.
        mixed_precision: "bf16" or "fp16" if the passes were computed in 16 bits, else "no".
        alternate_modalities: whether each batch held one modality, in turn, instead of both.
        energy_kwh, co2_kg: as measured by CodeCarbon; None without it.
        versions: versions of the packages.
    """

    name: str
    start: str
    steps: int
    max_length: int
    learning_rate: float
    tasks: list[dict[str, Any]]
    losses: dict[str, float] = field(default_factory=dict)
    curves: dict[str, list[list[float]]] = field(default_factory=dict)
    seconds: float = 0.0
    processes: int = 1
    device: str = ""
    mixed_precision: str = "no"
    alternate_modalities: bool = False
    energy_kwh: float | None = None
    co2_kg: float | None = None
    versions: dict[str, str] = field(default_factory=dict)


@dataclass
class Card:
    """The content of a model card that does not follow from the model itself.

    Args:
        name: the repository, "organisation/model"; the folder's name when None.
        description: what the model is and what it is for.
        metrics: figures by name.
        protocol: data and method of the figures.
        license: name on the Hub, such as "apache-2.0"; "other (name)" for one that the Hub has no name for.
        stages: stages of training in their order.
        onnx: comparison of the ONNX files with torch (`bifocal.hub.onnx.compare`); None without them.
        plots: caption of each plot by its path in the folder.
        sources: `name`, `license` and `on_hub` (whether the name is a Hub id) of each model that this one is made of.
    """

    name: str | None = None
    description: str = "A Bifocal model."
    metrics: dict[str, float] = field(default_factory=dict)
    protocol: str = ""
    license: str | None = None
    stages: Sequence[TrainedStage] = ()
    onnx: dict[str, Any] | None = None
    plots: dict[str, str] = field(default_factory=dict)
    sources: Sequence[dict[str, Any]] = ()


def write_card(path: Path, card: Card, name: str, model: Any, processor: Any) -> None:
    """Write the card of a model.

    Args:
        path: path of the README.md.
        card: its content.
        name: name that the card's code loads.
        model: a [`BifocalModel`].
        processor: its processor, as it is saved.
    """
    from huggingface_hub import ModelCard, ModelCardData

    config, images = model.config, processor.image_processor
    other = re.fullmatch(r"other \((.+)\)", card.license or "")
    towers = tower_facts(model)
    data = ModelCardData(
        library_name="sentence-transformers",
        pipeline_tag="sentence-similarity",
        tags=["bifocal", "clip", "image-text-retrieval", "sentence-transformers", "feature-extraction"],
        license="other" if other else card.license,
        license_name=other[1] if other else None,
        base_model=[source["name"] for source in card.sources if source["on_hub"]] or None,
        language="en" if towers["text"]["own"] and ignores_case(processor.tokenizer) else None,
        **_emissions(card.stages),
    )
    values = asdict(card) | {
        "name": name,
        "max_length": processor.tokenizer.model_max_length,
        "dimensions": config.projection_dim,
        "matryoshka": config.matryoshka_dimensions,
        "towers": towers,
        "padded": config.max_text_length if config.text_padding == "max_length" else None,
        "pixels": output_size(images)[::-1],  # height, width
        "patch": getattr(config.vision_config, "patch_size", None),
        "prompts": config.prompts,
        "uncased": ignores_case(processor.tokenizer),
        "cropped": bool(getattr(images, "do_center_crop", False)),
        "method": bool(card.stages) or towers["text"]["own"],
        "cost": _cost(card.stages),
    }
    template = Path(__file__).parent / "templates" / "card.md.j2"
    text = str(ModelCard.from_template(data, template_path=str(template), **values))
    # Sections that a card does not have leave empty lines.
    ModelCard(re.sub(r"\n{3,}", "\n\n", text)).save(str(path))


def _cost(stages: Sequence[TrainedStage]) -> dict[str, Any]:
    """Return hours and devices of training, and its energy if every stage measured it."""
    measured = [stage.energy_kwh for stage in stages if stage.energy_kwh is not None]
    emitted = [stage.co2_kg for stage in stages if stage.co2_kg is not None]
    complete = bool(stages) and len(measured) == len(stages)
    return {
        "hours": sum(stage.seconds for stage in stages) / 3600,
        "devices": list(dict.fromkeys(map(_devices, stages))),
        "energy_kwh": sum(measured) if complete else None,
        "co2_kg": sum(emitted) if complete else None,
    }


def _devices(stage: TrainedStage) -> str:
    return stage.device if stage.processes == 1 else f"{stage.processes} times {stage.device}"


def _emissions(stages: Sequence[TrainedStage]) -> dict[str, Any]:
    """Return the Hub's field for emissions, in grams."""
    cost = _cost(stages)
    if cost["co2_kg"] is None:
        return {}
    hardware = ", ".join(cost["devices"])
    return {
        "co2_eq_emissions": {
            "emissions": round(1000 * cost["co2_kg"], 3),
            "source": "CodeCarbon",
            "training_type": "pre-training",
            "hardware_used": hardware,
        }
    }
