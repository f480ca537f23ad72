"""Which parameters learn, how fast, and which decay."""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from bifocal.training.arguments import BifocalTrainingArguments
from bifocal.training.tasks import Task

# As in EVA, only matrices decay (not norms, biases, logit_scale), without learned positions and the class token.
_NO_DECAY = re.compile(
    "class_token|class_embedding|position_embedding|word_embeddings|token_type_embeddings|embed_tokens"
)
_LAYER = re.compile(r"\blayers?\.(\d+)\.")
_TOWERS = {
    "text": re.compile(r"\btext_(model|projection)\b"),
    "image": re.compile(r"\b(vision|visual)_(model|projection)\b"),
}


def tower_of(name: str) -> str:
    """Return "text", "image" or "shared", by the parameter names of Bifocal and transformers' dual encoders."""
    return next((tower for tower, pattern in _TOWERS.items() if pattern.search(name)), "shared")


def decays(name: str, parameter: nn.Parameter) -> bool:
    return parameter.ndim >= 2 and not _NO_DECAY.search(name)


def depth_of(name: str) -> int | None:
    """Return 0 for a tower's embeddings, n for its n-th layer, None for what stands above the layers."""
    layer = _LAYER.search(name)
    if layer:
        return int(layer[1]) + 1
    return 0 if re.search(r"\bembeddings?\b", name) else None


def without_gradient(model: nn.Module, tasks: Iterable[Task]) -> list[str]:
    """Return the names of the parameters that no task of a stage reaches.

    Every task has texts, so that is the image tower of a stage of texts alone, the temperature where each task has one
    of its own, and the bias without a sigmoid loss. DDP waits for the gradient of every parameter that wants one.
    """
    tasks = list(tasks)
    images = any(task.modality == "image" for task in tasks)
    learned = any(task.modality == "image" and task.temperature is None for task in tasks)
    sigmoid = any(task.loss == "sigmoid" for task in tasks)
    used = {"logit_scale": learned, "logit_bias": sigmoid}
    return [
        name
        for name, _ in model.named_parameters()
        if not used.get(name.rpartition(".")[2], images or tower_of(name) != "image")
    ]


@contextmanager
def not_trained(model: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """Switch the gradients of these parameters off within, and back on afterwards where they were on."""
    chosen = set(names)
    stopped = [p for name, p in model.named_parameters() if name in chosen and p.requires_grad]
    for parameter in stopped:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in stopped:
            parameter.requires_grad_(True)


def freeze(
    model: nn.Module,
    text_layers: int = 0,
    image_layers: int = 0,
    text_tower: bool = False,
    image_tower: bool = False,
) -> list[str]:
    """Freeze the first layers of each tower, or a tower without its projection; return the names of the parameters."""
    num_layers = {"text": text_layers, "image": image_layers}
    whole_towers = {"text": text_tower, "image": image_tower}
    frozen = []
    for name, parameter in model.named_parameters():
        tower, depth = tower_of(name), depth_of(name)
        layers = num_layers.get(tower, 0)
        in_layers = layers > 0 and depth is not None and depth <= layers
        in_tower = whole_towers.get(tower, False) and "_projection" not in name
        if parameter.requires_grad and (in_layers or in_tower):
            parameter.requires_grad_(False)
            frozen.append(name)
    return frozen


def parameter_groups(model: nn.Module, args: BifocalTrainingArguments) -> list[dict[str, Any]]:
    """Return parameter groups for an optimiser, one for each learning rate and weight decay, in a fixed order."""
    depths: dict[str, int] = {}
    for name, _ in model.named_parameters():
        depths[tower_of(name)] = max(depths.get(tower_of(name), 0), depth_of(name) or 0)
    rates = {"text": args.text_learning_rate, "image": args.image_learning_rate}
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        tower, depth = tower_of(name), depth_of(name)
        tower_rate = rates.get(tower)
        below = 0 if depth is None or tower == "shared" else depths[tower] + 1 - depth
        rate = (args.learning_rate if tower_rate is None else tower_rate) * args.layer_lr_decay**below
        decay = args.weight_decay if decays(name, parameter) else 0.0
        group = groups.setdefault((rate, decay), {"params": [], "lr": rate, "weight_decay": decay, "names": []})
        group["params"].append(parameter)
        group["names"].append(name)
    return [groups[key] for key in sorted(groups, reverse=True)]
