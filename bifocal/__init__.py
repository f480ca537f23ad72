"""Bifocal: one model for image search and text search.

Importing registers the model with transformers' Auto classes. The names of training are loaded at first use, since they
need the extra `train`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from bifocal.modeling import (
    BifocalConfig,
    BifocalModel,
    BifocalProcessor,
    BifocalTextConfig,
    BifocalTextForMaskedLM,
    BifocalTextModel,
    BifocalVisionConfig,
    BifocalVisionModel,
    load_image,
)

if TYPE_CHECKING:
    from bifocal.hub.export import export_model as export_model
    from bifocal.training.arguments import BifocalTrainingArguments as BifocalTrainingArguments
    from bifocal.training.tasks import Task as Task
    from bifocal.training.trainer import MultiTaskTrainer as MultiTaskTrainer

_AT_FIRST_USE = {
    "BifocalTrainingArguments": "bifocal.training.arguments",
    "MultiTaskTrainer": "bifocal.training.trainer",
    "Task": "bifocal.training.tasks",
    "export_model": "bifocal.hub.export",
}

__all__ = [
    "BifocalConfig",
    "BifocalModel",
    "BifocalProcessor",
    "BifocalTextConfig",
    "BifocalTextForMaskedLM",
    "BifocalTextModel",
    "BifocalTrainingArguments",
    "BifocalVisionConfig",
    "BifocalVisionModel",
    "MultiTaskTrainer",
    "Task",
    "export_model",
    "load_image",
]


def __getattr__(name: str) -> Any:
    if name in _AT_FIRST_USE:
        return getattr(import_module(_AT_FIRST_USE[name]), name)
    raise AttributeError(f"module 'bifocal' has no attribute '{name}'")
