"""Bifocal: one model for image search and text search.

- Models: `BifocalModel` and its towers `BifocalTextModel` and `BifocalVisionModel`, `BifocalTextForMaskedLM` for stage
  0, their configurations, `BifocalProcessor`, and `load_image`. Importing `bifocal` registers them with transformers'
  Auto classes.
- Data: `Source` describes files or a Hub id, `load_source` reads it.
- Training: `Task`, `MultiTaskTrainer`, `BifocalTrainingArguments`, and `EvaluationCallback` for retrieval metrics.
- Publishing: `export_model`.
- Search: `SearchIndex` and `Searcher`.
- Errors: `BifocalError`, the base class of errors that a user can fix.

Names other than models and `BifocalError` are loaded at first use, since they need extras such as `bifocal[train]`.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

_ROOT = Path(__file__).parents[1]
if (_ROOT / "pyproject.toml").is_file():
    # Imported from the root of a checkout, where the folders of `bifocal.*` are next to this one (see pyproject.toml).
    __path__.append(str(_ROOT))

from bifocal.errors import BifocalError  # noqa: E402
from bifocal.modeling import (  # noqa: E402
    BifocalConfig,
    BifocalModel,
    BifocalProcessor,
    BifocalTextConfig,
    BifocalTextForMaskedLM,
    BifocalTextModel,
    BifocalVisionConfig,
    BifocalVisionModel,
    fast_dtype,
    load_image,
)

if TYPE_CHECKING:
    from bifocal.data.augmentation import ImageAugmentation as ImageAugmentation
    from bifocal.data.loading import load_source as load_source
    from bifocal.data.source import Source as Source
    from bifocal.evaluation.callback import EvaluationCallback as EvaluationCallback
    from bifocal.hub.export import export_model as export_model
    from bifocal.hub.search.index import SearchIndex as SearchIndex
    from bifocal.hub.search.searcher import Searcher as Searcher
    from bifocal.training.arguments import BifocalTrainingArguments as BifocalTrainingArguments
    from bifocal.training.tasks import Task as Task
    from bifocal.training.trainer import MultiTaskTrainer as MultiTaskTrainer

_AT_FIRST_USE = {
    "BifocalTrainingArguments": "bifocal.training.arguments",
    "EvaluationCallback": "bifocal.evaluation.callback",
    "ImageAugmentation": "bifocal.data.augmentation",
    "MultiTaskTrainer": "bifocal.training.trainer",
    "SearchIndex": "bifocal.hub.search.index",
    "Searcher": "bifocal.hub.search.searcher",
    "Source": "bifocal.data.source",
    "Task": "bifocal.training.tasks",
    "export_model": "bifocal.hub.export",
    "load_source": "bifocal.data.loading",
}

__all__ = [
    "BifocalConfig",
    "BifocalError",
    "BifocalModel",
    "BifocalProcessor",
    "BifocalTextConfig",
    "BifocalTextForMaskedLM",
    "BifocalTextModel",
    "BifocalTrainingArguments",
    "BifocalVisionConfig",
    "BifocalVisionModel",
    "EvaluationCallback",
    "ImageAugmentation",
    "MultiTaskTrainer",
    "SearchIndex",
    "Searcher",
    "Source",
    "Task",
    "export_model",
    "fast_dtype",
    "load_image",
    "load_source",
]


def __getattr__(name: str) -> Any:
    if name in _AT_FIRST_USE:
        return getattr(import_module(_AT_FIRST_USE[name]), name)
    raise AttributeError(f"module 'bifocal' has no attribute '{name}'")
