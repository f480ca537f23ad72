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
    from bifocal.training.recipe import Source as Source
    from bifocal.training.sources import load_source as load_source
    from bifocal.training.tasks import Task as Task
    from bifocal.training.trainer import MultiTaskTrainer as MultiTaskTrainer

_AT_FIRST_USE = {
    "BifocalTrainingArguments": "bifocal.training.arguments",
    "MultiTaskTrainer": "bifocal.training.trainer",
    "Source": "bifocal.training.recipe",
    "Task": "bifocal.training.tasks",
    "export_model": "bifocal.hub.export",
    "load_source": "bifocal.training.sources",
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
    "Source",
    "Task",
    "export_model",
    "load_image",
    "load_source",
]


def __getattr__(name: str) -> Any:
    if name in _AT_FIRST_USE:
        return getattr(import_module(_AT_FIRST_USE[name]), name)
    raise AttributeError(f"module 'bifocal' has no attribute '{name}'")
