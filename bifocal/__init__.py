"""Bifocal: one model for image search and text search.

Importing registers the model with transformers' Auto classes. The names of training are loaded at first use, since they
need the extra `train`.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

_ROOT = Path(__file__).parents[1]
if (_ROOT / "pyproject.toml").is_file():
    # Imported from the root of a checkout, where the folders of `bifocal.*` lie beside this one (see pyproject.toml).
    __path__.append(str(_ROOT))

from bifocal.modeling import (  # noqa: E402
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
    from bifocal.data.loading import load_source as load_source
    from bifocal.data.source import Source as Source
    from bifocal.hub.export import export_model as export_model
    from bifocal.training.arguments import BifocalTrainingArguments as BifocalTrainingArguments
    from bifocal.training.tasks import Task as Task
    from bifocal.training.trainer import MultiTaskTrainer as MultiTaskTrainer

_AT_FIRST_USE = {
    "BifocalTrainingArguments": "bifocal.training.arguments",
    "MultiTaskTrainer": "bifocal.training.trainer",
    "Source": "bifocal.data.source",
    "Task": "bifocal.training.tasks",
    "export_model": "bifocal.hub.export",
    "load_source": "bifocal.data.loading",
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
