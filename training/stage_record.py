"""What a stage was trained on, how, and at what cost, for the model card; kept in the run's folder."""

import csv
import json
import os
from pathlib import Path
from typing import Any

import torch

from bifocal.data.source import Source
from bifocal.files import write_json
from bifocal.training.engine.distributed import ProcessGroupInfo
from bifocal.training.recipe import Recipe, StartFrom

STAGE = "stage.json"
FACTS = "card.json"  # in an exported model's folder; its `stages` are all those that led to it
_POINTS = 200  # of a curve
_CARBON = "emissions.csv"  # written by transformers' callback for CodeCarbon (report_to: codecarbon)


def stage_facts(prepared: Any, seconds: float, versions: dict[str, str]) -> dict[str, Any]:
    """The facts of a finished stage, by the names of `bifocal.hub.card.TrainedStage`.

    Args:
        prepared: the [`Prepared`] run, trained.
        seconds: of training.
    """
    recipe, trainer = prepared.recipe, prepared.trainer
    args, shares = trainer.args, trainer.joint_batches.schedule.shares
    world = ProcessGroupInfo.current().size
    sources = {task.name: task.data for task in recipe.tasks}
    tasks = [
        {
            "name": task.name, "kind": task.kind, "source": public_name(sources[task.name]), "rows": task.size,
            "batch_size": task.batch_size * world, "loss": task.loss, "loss_weight": task.loss_weight,
            "share": shares[task.name],
        }
        for task in prepared.tasks
    ]  # fmt: skip
    curves: dict[str, list[list[float]]] = {}
    for entry in trainer.state.log_history:
        for name, value in entry.items():
            if name.startswith("loss/"):
                curves.setdefault(name.removeprefix("loss/"), []).append([entry["step"], value])
    losses = {name: curve[-1][1] for name, curve in curves.items()}
    curves = {name: curve[:: -(-len(curve) // _POINTS)] for name, curve in curves.items()}
    return {
        "name": recipe.name, "start": start_name(recipe), "steps": trainer.state.global_step,
        "max_length": trainer.max_length, "learning_rate": args.learning_rate, "tasks": tasks, "losses": losses,
        "curves": curves,
        "seconds": seconds, "processes": world, "device": device_name(args.device), **_energy(recipe.folder),
        "versions": versions,
    }  # fmt: skip


def write_stage(folder: Path, facts: dict[str, Any]) -> None:
    """Keep a stage's facts in its run's folder; whole or not at all."""
    write_json(folder / STAGE, facts)


def public_name(source: Source) -> str:
    """A source by a name that says nothing of the machine: an id or address, or a file's own name."""
    path = source.title
    if "://" in path or (path.count("/") <= 1 and not path.startswith((".", "~")) and not os.path.exists(path)):
        return path if source.name is None else f"{path} ({source.name})"
    return Path(path).name


def start_name(recipe: Recipe) -> str:
    start = recipe.start_from
    if start is None:
        return "nothing"
    if isinstance(start, StartFrom):
        if start.stage is not None:
            return start.stage
        return " and ".join(public_name(Source(path=place)) for place in (start.text, start.image) if place)
    place = Path(start)
    if not place.exists():
        return start
    return place.parent.name if place.name == "model" else place.name


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    model = ""
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            model = next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), "")
    return f"{os.cpu_count()} CPU cores" + (f" ({model})" if model and model != "unknown" else "")


def _energy(folder: Path) -> dict[str, float]:
    """Sums over all sessions that CodeCarbon wrote down in the run's folder; nothing where it did not run."""
    path = folder / _CARBON
    if not path.exists():
        return {}
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return {
        "energy_kwh": sum(float(row["energy_consumed"]) for row in rows),
        "co2_kg": sum(float(row["emissions"]) for row in rows),
    }


def earlier_stages(recipe: Recipe) -> list[dict[str, Any]]:
    """The stages that led to what a recipe starts from, as far as its folder or repository tells."""
    start = recipe.start_from
    if isinstance(start, StartFrom):
        start = None if start.stage is None else str(Path("runs") / start.stage / "model")
    if start is None:
        return []
    path = Path(start) / FACTS
    if not Path(start).exists():
        from transformers.utils import cached_file

        found = cached_file(start, FACTS, _raise_exceptions_for_missing_entries=False,
                            _raise_exceptions_for_connection_errors=False)  # fmt: skip
        if found is None:
            return []
        path = Path(found)
    return json.loads(path.read_text(encoding="utf-8"))["stages"] if path.exists() else []
