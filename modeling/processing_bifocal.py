# Copyright 2026 The Bifocal authors. Licensed under the Apache License, Version 2.0.
"""The processor: a WordPiece tokenizer for texts and `CLIPImageProcessor` for pictures."""

from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.processing_utils import ProcessorMixin

from .image_bifocal import load_image


class BifocalProcessor(ProcessorMixin):
    """Texts to token ids and pictures to pixel values.

    Args:
        image_processor: a `CLIPImageProcessor` of the image tower's size.
        tokenizer: a `BertTokenizer`.
    """

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, **kwargs: Any) -> None:
        super().__init__(image_processor, tokenizer, **kwargs)

    def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> Any:
        """
        Args:
            images: a picture or a list of pictures, each of any kind that `load_image` reads.
            text: a string or a list of strings.
            kwargs: as for any processor of transformers: `return_tensors`, `padding`, `truncation`, `text_kwargs`...

        Returns:
            A `BatchFeature` with `pixel_values` (images, 3, height, width) and / or `input_ids` and `attention_mask`
            (texts, length).

        Raises:
            ValueError, FileNotFoundError: a picture that cannot be read, named.
        """
        if images is not None:
            images = [load_image(image) for image in as_list(images)]
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
