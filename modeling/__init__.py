"""Bifocal's model, configuration and processor. Importing registers them with transformers' Auto classes.

Its code may run twice, so registering twice is no error (see `bifocal.registration`).

The files of this folder are what a Hub repository ships as remote code: flat, importing only each other (relatively),
torch, transformers, numpy and Pillow.
"""

import transformers  # noqa: F401  # alone and first: if another thread is importing it, the next line would fail
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForZeroShotImageClassification,
    AutoProcessor,
)

from .configuration_bifocal import BifocalConfig, BifocalTextConfig, BifocalVisionConfig
from .dtype_bifocal import fast_dtype
from .image_bifocal import load_image
from .modeling_bifocal import BifocalModel, BifocalOutput
from .modeling_bifocal_text import BifocalTextForMaskedLM, BifocalTextModel
from .modeling_bifocal_vision import BifocalVisionModel
from .processing_bifocal import BifocalProcessor

for _config, _model in (
    (BifocalConfig, BifocalModel),
    (BifocalTextConfig, BifocalTextModel),
    (BifocalVisionConfig, BifocalVisionModel),
):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModel.register(_config, _model, exist_ok=True)
    # Classes registered "for auto class" are saved with their code and named in `auto_map`.
    _config.register_for_auto_class()
    _model.register_for_auto_class("AutoModel")
AutoModelForMaskedLM.register(BifocalTextConfig, BifocalTextForMaskedLM, exist_ok=True)
BifocalTextForMaskedLM.register_for_auto_class("AutoModelForMaskedLM")
AutoModelForZeroShotImageClassification.register(BifocalConfig, BifocalModel, exist_ok=True)
AutoProcessor.register(BifocalConfig, BifocalProcessor, exist_ok=True)
BifocalProcessor.register_for_auto_class()

__all__ = [
    "BifocalConfig",
    "BifocalModel",
    "BifocalOutput",
    "BifocalProcessor",
    "BifocalTextConfig",
    "BifocalTextForMaskedLM",
    "BifocalTextModel",
    "BifocalVisionConfig",
    "BifocalVisionModel",
    "fast_dtype",
    "load_image",
]
