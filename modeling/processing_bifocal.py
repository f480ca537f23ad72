# Copyright 2026 The Bifocal authors. Licensed under the Apache License, Version 2.0.
"""The processor: a WordPiece tokenizer for texts and `CLIPImageProcessor` for images."""

import copy
import itertools
from typing import Any

from tokenizers import Tokenizer
from transformers.processing_utils import ProcessorMixin

from .image_bifocal import list_images, load_images


class BifocalProcessor(ProcessorMixin):
    """Texts to token ids and images to pixel values; many threads may call one processor at once.

    Args:
        image_processor: a `CLIPImageProcessor` of the image tower's size.
        tokenizer: a `BertTokenizer`.
    """

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, **kwargs: Any) -> None:
        super().__init__(image_processor, tokenizer, **kwargs)

    def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> Any:
        """
        Args:
            images: one image or several, each of any kind that `load_image` reads; nested lists are flattened.
            text: a string or a list of strings.
            kwargs: as for any processor of transformers: `return_tensors`, `padding`, `truncation`, `text_kwargs`...

        Returns:
            A `BatchFeature` with `pixel_values` (images, 3, height, width) and / or `input_ids` and `attention_mask`
            (texts, length).

        Raises:
            ValueError, FileNotFoundError: if an image cannot be read; it is named by its path or position.
        """
        if images is not None:
            images = load_images(list_images(images)[0])
        processor = self
        if text is not None:
            processor = copy.copy(self)
            processor.tokenizer = private_tokenizer(self.tokenizer)
        return super(BifocalProcessor, processor).__call__(images=images, text=text, **kwargs)

    def save_pretrained(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> Any:
        """Save as any processor, and the image processor also in `preprocessor_config.json`, as other tools read it."""
        if self.image_processor is not None:
            self.image_processor.save_pretrained(save_directory)
        return super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)


def private_tokenizer(tokenizer: Any) -> Any:
    """Return a copy of a tokenizer that shares its vocabulary and rules, but not its truncation and padding.

    A fast tokenizer of transformers keeps truncation and padding as settings of one shared object, and each call
    changes them. Two threads with different options would get each other's; a copy per call cannot.
    """
    shared = getattr(tokenizer, "backend_tokenizer", None)
    if shared is None:  # written in Python: options are arguments there
        return tokenizer
    own = Tokenizer(shared.model)
    for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        if getattr(shared, part) is not None:
            setattr(own, part, getattr(shared, part))
    added = [token for _, token in sorted(shared.get_added_tokens_decoder().items())]
    for special, group in itertools.groupby(added, key=lambda token: token.special):
        (own.add_special_tokens if special else own.add_tokens)(list(group))
    own.encode_special_tokens = getattr(tokenizer, "split_special_tokens", False)
    private = copy.copy(tokenizer)
    private._tokenizer = own
    return private


def token_ids(tokenizer: Any, texts: list[str], max_length: int) -> tuple[list[list[int]], list[int]]:
    """Return each text's token ids, cut as `tokenizer(texts, truncation=True, max_length=max_length)` cuts them.

    Args:
        tokenizer: as from `private_tokenizer`.

    Returns:
        The ids, and how many tokens each text has when it is not cut; both with special tokens.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        cut = tokenizer(texts, truncation=True, max_length=max_length)["input_ids"]
        return cut, [len(ids) for ids in tokenizer(texts, truncation=False, verbose=False)["input_ids"]]
    special = backend.num_special_tokens_to_add(False)
    encodings = backend.encode_batch(texts, add_special_tokens=False)
    lengths = [len(encoding) + special for encoding in encodings]
    for encoding, length in zip(encodings, lengths, strict=True):
        if length > max_length:
            encoding.truncate(max_length - special, direction=tokenizer.truncation_side)
    return [backend.post_process(encoding).ids for encoding in encodings], lengths
