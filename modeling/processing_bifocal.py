# Copyright 2026 The Bifocal authors. Licensed under the Apache License, Version 2.0.
"""The processor: a WordPiece tokenizer for texts and `CLIPImageProcessor` for pictures."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.processing_utils import ProcessorMixin

from .image_bifocal import load_image

_LIMIT_UNSET = 10**9  # transformers' "no limit" is 1e30


class BifocalProcessor(ProcessorMixin):
    """Texts to token ids and pictures to pixel values.

    Args:
        image_processor: a `CLIPImageProcessor` of the image tower's size.
        tokenizer: a `BertTokenizer`; its `model_max_length` is the longest text in tokens.
    """

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, **kwargs: Any) -> None:
        # What `tokenizer.json` says of truncation is for other libraries; transformers would take it for an argument of
        # every call, and a `model_max_length` set later would change nothing.
        for name in ("max_length", "stride", "truncation_strategy"):
            getattr(tokenizer, "init_kwargs", {}).pop(name, None)
        super().__init__(image_processor, tokenizer, **kwargs)

    def save_pretrained(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> Any:
        """As `ProcessorMixin.save_pretrained`; `tokenizer.json` cuts texts at `model_max_length`.

        transformers writes the state that the last call left there: no truncation, or another length.
        """
        files = super().save_pretrained(save_directory)
        path = Path(save_directory) / "tokenizer.json"
        if path.exists():
            backend = type(self.tokenizer.backend_tokenizer).from_file(str(path))
            backend.no_padding()
            backend.no_truncation()
            if self.tokenizer.model_max_length < _LIMIT_UNSET:
                backend.enable_truncation(self.tokenizer.model_max_length, direction=self.tokenizer.truncation_side)
            backend.save(str(path))
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", Path(save_directory).name), **kwargs)
        return files

    def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> Any:
        """
        Args:
            images: a picture or a list of pictures, each of any kind that `load_image` reads.
            text: a string or a list of strings.
            kwargs: as for any processor of transformers: `return_tensors`, `padding`, `truncation`, `text_kwargs`...
                Texts are padded and cut at the tokenizer's `model_max_length` by default.

        Returns:
            A `BatchFeature` with `pixel_values` (images, 3, height, width) and / or `input_ids` and `attention_mask`
            (texts, length).

        Raises:
            ValueError, FileNotFoundError: a picture that cannot be read, named.
        """
        if images is not None:
            images = [load_image(image) for image in as_list(images)]
        if text is not None:  # as `encode_text` does
            defaults = {name: True for name in ("padding", "truncation") if name not in kwargs}
            kwargs["text_kwargs"] = defaults | kwargs.get("text_kwargs", {})
        return super().__call__(images=images, text=text, **kwargs)


def as_list(images: Any) -> list[Any]:
    """A list of pictures from one picture, an array or tensor of several (a leading batch axis), or a sequence."""
    if isinstance(images, np.ndarray | torch.Tensor):
        return list(images) if images.ndim == 4 else [images]
    if isinstance(images, list | tuple):
        return list(images)
    if isinstance(images, str | bytes | Image.Image) or not hasattr(images, "__iter__"):
        return [images]
    return list(images)
