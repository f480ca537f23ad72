"""Which parameters learn, how fast, and which decay."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from bifocal.errors import TrainingError
from bifocal.training.arguments import BifocalTrainingArguments
from bifocal.training.engine.joint_forward import embed
from bifocal.training.tasks import Task
from bifocal.training.towers import Tower, is_table, require_own_parameters, tower_of, towers_of


def decaying(model: nn.Module) -> set[str]:
    """Return the names of the parameters that weight decay is for: matrices, as in EVA.

    Not biases, norms and `logit_scale`, which have one dimension; not tables of embeddings; not learned tokens and
    positions, whose first dimension is 1 if they are no layer of PyTorch's.
    """
    names = set()
    for prefix, module in model.named_modules():
        is_layer = type(module).__module__.startswith("torch.nn.modules")
        for name, parameter in module.named_parameters(recurse=False):
            is_token = not is_layer and parameter.shape[:1] == (1,)
            if parameter.ndim >= 2 and not is_table(module) and not is_token:
                names.add(f"{prefix}.{name}" if prefix else name)
    return names


def without_gradient(
    model: Any, tasks: Iterable[Task], examples: tuple[list[Any], list[Any]] | None = None
) -> list[str]:
    """Return the names of the parameters that no task of a stage reaches. DDP waits for the gradients of all others.

    Those are the image tower in a stage of texts alone, what a tower does not use (a mask token, a head that another
    pooling bypasses), the temperature where each task has one of its own, and the bias without a sigmoid loss.

    Args:
        model: dual encoder.
        tasks: its tasks; each has texts.
        examples: inputs of the text and of the image tower; embedding them shows what a tower uses. Without them, that
            is taken to be everything.
    """
    tasks = list(tasks)
    with_images = any(task.modality == "image" for task in tasks)
    learned = any(task.modality == "image" and task.temperature is None for task in tasks)
    sigmoid = any(task.loss == "sigmoid" for task in tasks)
    used = {"logit_scale": learned, "logit_bias": sigmoid}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if examples is None:
        reached = {name for name in trained if with_images or tower_of(name) != "image"}
    else:
        reached = _reached(model, trained, examples[0], examples[1] if with_images else [])
    return [name for name in trained if not used.get(name.rpartition(".")[2], name in reached)]


def _reached(model: Any, parameters: dict[str, nn.Parameter], texts: list[Any], images: list[Any]) -> set[str]:
    """Return the names of the parameters that get a gradient from an embedding of the texts and images."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()  # nothing is drawn
    try:
        with torch.enable_grad():
            embeddings = embed(model, texts, images)
            total = sum(embeddings[name].sum() for name in ("texts", "images") if name in embeddings)
        if not isinstance(total, torch.Tensor) or not total.requires_grad:
            return set()
        gradients = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
    finally:
        for module, mode in modes:
            module.training = mode
    return {name for name, gradient in zip(parameters, gradients, strict=True) if gradient is not None}


def require_trained_by_texts(model: nn.Module) -> None:
    """Check that a step of texts alone can train something.

    Raises:
        TrainingError: if all that texts reach is frozen.
    """
    scalars = ("logit_scale", "logit_bias")
    trained = (name for name, parameter in model.named_parameters() if parameter.requires_grad)
    if not any(tower_of(name) != "image" and name.rpartition(".")[2] not in scalars for name in trained):
        raise TrainingError(
            "alternate_modalities makes steps of texts, but all that texts reach is frozen. Remove it, or the tasks of "
            "texts."
        )


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
    """Freeze the first layers of each tower, or a tower without its projection; return the names of the parameters.

    Raises:
        TrainingError: if a tower has too few layers or none, or the towers share parameters.
    """
    num_layers = {"text": text_layers, "image": image_layers}
    whole_towers = {"text": text_tower, "image": image_tower}
    chosen: set[int] = set()
    for tower in towers_of(model):
        if whole_towers[tower.name]:
            require_own_parameters(model, f"freeze_{tower.name}_tower")
            chosen |= {id(parameter) for parameter in tower.module.parameters()}
        elif num_layers[tower.name]:
            chosen |= _first_layers(model, tower, num_layers[tower.name])
    frozen = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) in chosen:
            parameter.requires_grad_(False)
            frozen.append(name)
    return frozen


def _first_layers(model: nn.Module, tower: Tower, number: int) -> set[int]:
    """Return the `id`s of the parameters of a tower's first layers and of what is below them."""
    setting = f"freeze_{tower.name}_layers"
    require_own_parameters(model, setting)
    layers = len(tower.layers(setting))
    if number > layers:
        raise TrainingError(
            f"{setting} is {number}, but the {tower.name} tower has {layers} layers; see also "
            f"freeze_{tower.name}_tower."
        )
    return {parameter for parameter, depth in tower.depths(setting).items() if depth <= number}


def parameter_groups(model: nn.Module, args: BifocalTrainingArguments) -> list[dict[str, Any]]:
    """Return parameter groups for an optimiser, one for each learning rate and weight decay, in a fixed order.

    Raises:
        TrainingError: if rates by layer are set for a tower without layers, or rates by tower for towers that share
            parameters.
    """
    rates = {"text": args.text_learning_rate, "image": args.image_learning_rate}
    levels: dict[int, int] = {}  # by the id of a parameter: how many levels it is below the top of its tower
    if args.layer_lr_decay != 1.0:
        require_own_parameters(model, "layer_lr_decay")
        for tower in towers_of(model):
            depths = tower.depths("layer_lr_decay")
            top = len(tower.layers("layer_lr_decay")) + 1
            levels |= {parameter: top - depth for parameter, depth in depths.items()}
    for tower_name, rate in rates.items():
        if rate is not None:
            require_own_parameters(model, f"{tower_name}_learning_rate")
    decayed = decaying(model)
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        tower_rate = rates.get(tower_of(name))
        rate = args.learning_rate if tower_rate is None else tower_rate
        rate *= args.layer_lr_decay ** levels.get(id(parameter), 0)
        decay = args.weight_decay if name in decayed else 0.0
        group = groups.setdefault((rate, decay), {"params": [], "lr": rate, "weight_decay": decay, "names": []})
        group["params"].append(parameter)
        group["names"].append(name)
    return [groups[key] for key in sorted(groups, reverse=True)]
