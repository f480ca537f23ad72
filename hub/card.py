"""The model card: purpose, use, training, figures and limits of a model."""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class TrainedStage:
    """One stage of training as it was really run.

    Args:
        name: of the recipe.
        start: what it began with: "nothing", a Hub id or the stage before.
        steps, max_length, learning_rate: of the stage; lengths in tokens.
        tasks: for each task its `name`, `kind`, `source`, `rows` (None of a stream), `batch_size` (all processes
            together), `loss`, `loss_weight` and `share` of the batches of its sort.
        losses: the last logged loss by task.
        curves: (step, loss) by task.
        seconds: of training, all runs of a stage that was killed together.
        processes, device: what it ran on.
        energy_kwh, co2_kg: as CodeCarbon measured them, None where it did not run.
        versions: of the packages.
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
    energy_kwh: float | None = None
    co2_kg: float | None = None
    versions: dict[str, str] = field(default_factory=dict)


@dataclass
class Card:
    """What a model card says that the model itself does not.

    Args:
        name: the repository, "organisation/model"; the folder's name when None.
        description: what the model is and is made for.
        metrics: value by name.
        protocol: on what the metrics were measured, and how.
        license: as the Hub names it, such as "apache-2.0".
        stages: of training, the first one first.
        onnx: what was measured of the ONNX files (`bifocal.hub.onnx`); None without them.
        plots: files in the folder and what they show.
    """

    name: str | None = None
    description: str = "A Bifocal model."
    metrics: dict[str, float] = field(default_factory=dict)
    protocol: str = ""
    license: str | None = None
    stages: Sequence[TrainedStage] = ()
    onnx: dict[str, Any] | None = None
    plots: dict[str, str] = field(default_factory=dict)


def write_card(path: Path, card: Card, name: str, model: Any, max_length: int) -> None:
    """Write a card for a model; `name` is what its code loads.

    Args:
        path: of the README.md.
        model: a [`BifocalModel`].
        max_length: tokens of a text beyond which it is cut.
    """
    from huggingface_hub import ModelCard, ModelCardData

    data = ModelCardData(
        library_name="sentence-transformers",
        pipeline_tag="sentence-similarity",
        tags=["bifocal", "clip", "image-text-retrieval", "sentence-transformers", "feature-extraction"],
        license=card.license,
        language="en",
        **_emissions(card.stages),
    )
    values = asdict(card) | {
        "name": name,
        "max_length": max_length,
        "dimensions": model.config.projection_dim,
        "text": model.config.text_config,
        "image": model.config.vision_config,
        "text_parameters": sum(p.numel() for p in model.text_model.parameters()),
        "image_parameters": sum(p.numel() for p in model.vision_model.parameters()),
        "cost": _cost(card.stages),
    }
    template = Path(__file__).parent / "templates" / "card.md.j2"
    written = str(ModelCard.from_template(data, template_path=str(template), **values))
    # Sections that a card lacks leave empty lines.
    ModelCard(re.sub(r"\n{3,}", "\n\n", written)).save(str(path))


def _cost(stages: Sequence[TrainedStage]) -> dict[str, Any]:
    """Hours of training on the devices used; energy only if every stage measured it."""
    measured = [stage.energy_kwh for stage in stages if stage.energy_kwh is not None]
    emitted = [stage.co2_kg for stage in stages if stage.co2_kg is not None]
    complete = bool(stages) and len(measured) == len(stages)
    return {
        "hours": sum(stage.seconds for stage in stages) / 3600,
        "devices": list(dict.fromkeys(map(_where, stages))),
        "energy_kwh": sum(measured) if complete else None,
        "co2_kg": sum(emitted) if complete else None,
    }


def _where(stage: TrainedStage) -> str:
    return stage.device if stage.processes == 1 else f"{stage.processes} times {stage.device}"


def _emissions(stages: Sequence[TrainedStage]) -> dict[str, Any]:
    """The Hub's field for emissions, in grams."""
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
