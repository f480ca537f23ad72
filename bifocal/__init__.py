"""Bifocal: one model for image search and text search.

- Models: `BifocalModel` and its towers `BifocalTextModel` and `BifocalVisionModel`, `BifocalTextForMaskedLM` for stage
  0, their configurations, `BifocalProcessor`, and `load_image`. Importing `bifocal` registers them with transformers'
  Auto classes (see `bifocal.registration`).
- Data: `Source` describes files or a Hub id, `load_source` reads it.
- Training: `Task`, `MultiTaskTrainer`, `BifocalTrainingArguments`, and `EvaluationCallback` for retrieval metrics.
- Publishing: `export_model`.
- Search: `SearchIndex` and `Searcher`.
- Errors: `BifocalError`, the base class of errors that a user can fix.

Names other than `BifocalError` are loaded at first use: torch and transformers take seconds to import, and names other
than models need extras such as `bifocal[train]`.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

_ROOT = Path(__file__).parents[1]
if (_ROOT / "pyproject.toml").is_file():
    # Imported from the root of a checkout, where the folders of `bifocal.*` are next to this one (see pyproject.toml).
    __path__.append(str(_ROOT))

from bifocal.errors import BifocalError  # noqa: E402
from bifocal.registration import register_with_transformers, wait_for_transformers  # noqa: E402

if TYPE_CHECKING:
    from bifocal.data.augmentation import ImageAugmentation as ImageAugmentation
    from bifocal.data.loading import load_source as load_source
    from bifocal.data.source import Source as Source
    from bifocal.evaluation.callback import EvaluationCallback as EvaluationCallback
    from bifocal.hub.export import export_model as export_model
    from bifocal.hub.search.index import SearchIndex as SearchIndex
    from bifocal.hub.search.searcher import Searcher as Searcher
    from bifocal.modeling import BifocalConfig as BifocalConfig
    from bifocal.modeling import BifocalModel as BifocalModel
    from bifocal.modeling import BifocalProcessor as BifocalProcessor
    from bifocal.modeling import BifocalTextConfig as BifocalTextConfig
    from bifocal.modeling import BifocalTextForMaskedLM as BifocalTextForMaskedLM
    from bifocal.modeling import BifocalTextModel as BifocalTextModel
    from bifocal.modeling import BifocalVisionConfig as BifocalVisionConfig
    from bifocal.modeling import BifocalVisionModel as BifocalVisionModel
    from bifocal.modeling import fast_dtype as fast_dtype
    from bifocal.modeling import load_image as load_image
    from bifocal.training.arguments import BifocalTrainingArguments as BifocalTrainingArguments
    from bifocal.training.tasks import Task as Task
    from bifocal.training.trainer import MultiTaskTrainer as MultiTaskTrainer

_AT_FIRST_USE = {
    "BifocalConfig": "bifocal.modeling",
    "BifocalModel": "bifocal.modeling",
    "BifocalProcessor": "bifocal.modeling",
    "BifocalTextConfig": "bifocal.modeling",
    "BifocalTextForMaskedLM": "bifocal.modeling",
    "BifocalTextModel": "bifocal.modeling",
    "BifocalTrainingArguments": "bifocal.training.arguments",
    "BifocalVisionConfig": "bifocal.modeling",
    "BifocalVisionModel": "bifocal.modeling",
    "EvaluationCallback": "bifocal.evaluation.callback",
    "ImageAugmentation": "bifocal.data.augmentation",
    "MultiTaskTrainer": "bifocal.training.trainer",
    "SearchIndex": "bifocal.hub.search.index",
    "Searcher": "bifocal.hub.search.searcher",
    "Source": "bifocal.data.source",
    "Task": "bifocal.training.tasks",
    "export_model": "bifocal.hub.export",
    "fast_dtype": "bifocal.modeling",
    "load_image": "bifocal.modeling",
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
    if name == "modeling":
        return import_module("bifocal.modeling")
    if name in _AT_FIRST_USE:
        wait_for_transformers()
        return getattr(import_module(_AT_FIRST_USE[name]), name)
    raise AttributeError(f"module 'bifocal' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "modeling"})


register_with_transformers()
