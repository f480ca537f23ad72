"""One forward pass over everything a step embeds, through whatever a model is wrapped in.

DDP, FSDP and accelerate's mixed precision work through a model's `forward`, called once before a backward pass. So
`joint_forward` gives a dual encoder a `forward` that also takes a step's inputs and calls both towers.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional as F

from bifocal.errors import TrainingError
from bifocal.modeling import BifocalModel
from bifocal.training.tasks import Task

Inputs = dict[str, torch.Tensor]


def embed(model: Any, texts: Sequence[Inputs], images: Sequence[Inputs]) -> dict[str, torch.Tensor]:
    """Return unit vectors of texts and images, and the temperature and bias of the image-text loss.

    Args:
        model: with `get_text_features` and `get_image_features`, as Bifocal and transformers' CLIP and SigLIP have.
        texts, images: inputs of the two methods, any number of parts.

    Returns:
        `texts` (all texts, D) and `images` (all images, D), each only if given; `scale`, 1 / tau; `bias`, if learned.
    """
    outputs = {}
    if texts:
        outputs["texts"] = _unit_vectors([model.get_text_features(**part) for part in texts])
    if images:
        base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
        options = {"pooled_only": True} if isinstance(base, BifocalModel) else {}
        outputs["images"] = _unit_vectors([model.get_image_features(**part, **options) for part in images])
    return outputs | temperature_of(model)


def logit_scale_bounds(model: Any) -> tuple[float, float] | None:
    """Return the smallest and largest ln(1 / tau) of a dual encoder; None if it has no bounds.

    Bifocal's maximum is in its config, None for no bounds. CLIP cuts at 100 while it trains; SigLIP, which learns a
    bias, never does.
    """
    unlimited = getattr(model, "logit_bias", None) is not None
    largest = getattr(getattr(model, "config", None), "logit_scale_max", None if unlimited else math.log(100.0))
    return None if largest is None else (0.0, largest)


@torch.no_grad()
def clamp_logit_scale(model: Any) -> None:
    """Clamp the parameter itself, so that the clamp of the forward pass lets a gradient through.

    The bounds are exactly those of the forward pass: a parameter beyond them would never get a gradient again.
    """
    scale, bounds = getattr(model, "logit_scale", None), logit_scale_bounds(model)
    if scale is not None and scale.requires_grad and bounds is not None:
        scale.clamp_(*bounds)


def temperature_of(model: Any) -> dict[str, torch.Tensor]:
    """Return `scale` and `bias` of a dual encoder, each if it has one."""
    scalars = {}
    scale, bounds = getattr(model, "logit_scale", None), logit_scale_bounds(model)
    if hasattr(model, "get_logit_scale"):
        scalars["scale"] = model.get_logit_scale()
    elif scale is not None:
        scalars["scale"] = (scale if bounds is None else scale.clamp(*bounds)).exp().reshape(())
    bias = getattr(model, "logit_bias", None)
    if bias is not None:
        scalars["bias"] = bias.reshape(())
    return scalars


def touch_scalars(embeddings: dict[str, torch.Tensor]) -> torch.Tensor | float:
    """Return a zero with a graph to `scale` and `bias`: DDP waits for their gradients even if no task uses them."""
    scalars = [embeddings[name] for name in ("scale", "bias") if name in embeddings]
    return sum((0.0 * scalar for scalar in scalars if scalar.requires_grad), 0.0)


def _unit_vectors(outputs: Sequence[Any]) -> torch.Tensor:
    pooled = [output if isinstance(output, torch.Tensor) else output.pooler_output for output in outputs]
    return F.normalize(torch.cat(pooled).float(), dim=-1)


def require_dual_encoder(model: Any, processor: Any, tasks: Sequence[Task]) -> None:
    """Check that a model and processor can embed the rows of the tasks.

    Raises:
        TrainingError: if the model cannot embed what the tasks hold, or nothing prepares its inputs.
    """
    methods = ["get_text_features"]
    if any(task.modality == "image" for task in tasks):
        methods.append("get_image_features")
    missing = next((method for method in methods if not callable(getattr(model, method, None))), None)
    if missing is not None:
        raise TrainingError(
            f"A {type(model).__name__} has no {missing}; MultiTaskTrainer trains dual encoders, such as BifocalModel, "
            "CLIPModel or SiglipModel."
        )
    for part in ("tokenizer", "image_processor"):
        if getattr(processor, part, None) is None:
            has = "The model comes without a processor" if processor is None else f"The processor has no {part}"
            raise TrainingError(f"{has}; pass processor=..., such as CLIPProcessor.from_pretrained(folder).")


@contextmanager
def joint_forward(model: Any) -> Iterator[None]:
    """Make `model(step_texts=..., step_images=...)` call `embed` within; other calls stay as they are."""
    before: Callable[..., Any] | None = vars(model).get("forward")
    original = model.forward

    def forward(*args: Any, step_texts: Any = None, step_images: Any = None, **kwargs: Any) -> Any:
        if step_texts is None and step_images is None:
            return original(*args, **kwargs)
        return embed(model, step_texts or [], step_images or [])

    model.forward = forward
    try:
        yield
    finally:
        if before is None:
            del model.forward
        else:
            model.forward = before
