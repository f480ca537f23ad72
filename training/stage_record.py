"""The record of a trained stage in the run's folder: its data, settings, losses and cost, for the model card."""

import csv
import json
import os
from pathlib import Path
from typing import Any

import torch
from transformers.utils import cached_file

from bifocal.data.source import Source
from bifocal.files import RUN, overwrite, write_json
from bifocal.training.engine.distributed import ProcessGroupInfo
from bifocal.training.recipe import Recipe, StartFrom

STAGE = "stage.json"
FACTS = "card.json"  # in an exported model's folder; its `stages` are all those that led to it
_POINTS = 200  # of a curve
_CARBON = "emissions.csv"  # written by transformers' callback for CodeCarbon (report_to: codecarbon)


def stage_facts(prepared: Any, seconds: float, versions: dict[str, str]) -> dict[str, Any]:
    """Return the record of a finished stage.

    Its keys are the fields of `bifocal.hub.card.TrainedStage`, which reads it: training and hub do not import each
    other, the file is their interface, and an unknown key is an error there.

    Args:
        prepared: the [`Prepared`] run, trained.
        seconds: time spent in training.
        versions: versions of the packages by name.
    """
    recipe, trainer = prepared.recipe, prepared.trainer
    args, shares = trainer.args, trainer.joint_batches.schedule.shares
    world = ProcessGroupInfo.current().size
    sources = {task.name: task.source for item in recipe.tasks for task in item.expanded()}
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
        "seconds": seconds, "processes": world, "device": device_name(args.device),
        "mixed_precision": args.mixed_precision,
        "alternate_modalities": trainer.joint_batches.schedule.alternates, **_energy(recipe.folder),
        "versions": versions,
    }  # fmt: skip


def write_stage(folder: Path, facts: dict[str, Any]) -> None:
    """Write a stage's record into its run's folder.

    Raises:
        NotOursError: if a file of that name exists that Bifocal did not write.
    """
    with overwrite(folder / STAGE, RUN) as scratch:
        write_json(scratch, facts)


def public_name(source: Source) -> str:
    """Return a name of a source that reveals no local path: an id, an address, or a file's own name."""
    path = source.title
    if "://" in path or (path.count("/") <= 1 and not path.startswith((".", "~")) and not os.path.exists(path)):
        return path if source.name is None else f"{path} ({source.name})"
    return Path(path).name


def start_name(recipe: Recipe) -> str:
    """Return the public name of the weights that a recipe starts from."""
    start = recipe.start_from
    if start is None:
        return "nothing"
    if isinstance(start, StartFrom):
        if start.stage is not None:
            return start.stage
        return " and ".join(public_name(Source(path=path)) for path in (start.text, start.image) if path)
    path = Path(start)
    if not path.exists():
        return start
    return path.parent.name if path.name == "model" else path.name


def device_name(device: torch.device) -> str:
    """Return the name of a GPU, or the number of CPU cores and their model."""
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
    """Return energy and emissions that CodeCarbon recorded in the run's folder, summed; empty if it did not run."""
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
    """Return the records of the stages before a recipe, from the folder or repository that it starts from."""
    start = recipe.start_from
    if isinstance(start, StartFrom):
        start = None if start.stage is None else str(Path("runs") / start.stage / "model")
    if start is None:
        return []
    path = Path(start) / FACTS
    if not Path(start).exists():
        cached = cached_file(start, FACTS, _raise_exceptions_for_missing_entries=False,
                             _raise_exceptions_for_connection_errors=False)  # fmt: skip
        if cached is None:
            return []
        path = Path(cached)
    return json.loads(path.read_text(encoding="utf-8"))["stages"] if path.exists() else []
