# Copyright 2026 The Bifocal authors. Licensed under the Apache License, Version 2.0.
"""The processor: a tokenizer for texts and an image processor, of any family of transformers."""

import copy
import itertools
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.clip import CLIPImageProcessorPil
from transformers.processing_utils import ProcessorMixin
from transformers.utils import is_torchvision_available

from .image_bifocal import list_images, load_images

_LIMIT_UNSET = 10**9  # transformers' "no limit" is 1e30


class BifocalProcessor(ProcessorMixin):
    """Converts texts to token ids and images to pixel values; several threads may call one processor at once.

    Args:
        image_processor: image processor of the image tower, a `CLIPImageProcessor` of its size for Bifocal's own.
        tokenizer: tokenizer of the text tower; its `model_max_length` is the longest text in tokens.
    """

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, **kwargs: Any) -> None:
        # The truncation in `tokenizer.json` is for other libraries. transformers would pass it to every call, and a
        # `model_max_length` set later would have no effect.
        for name in ("max_length", "stride", "truncation_strategy"):
            getattr(tokenizer, "init_kwargs", {}).pop(name, None)
        super().__init__(image_processor, tokenizer, **kwargs)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: Any, **kwargs: Any
    ) -> Any:
        """Load as `ProcessorMixin.from_pretrained` does; images are always prepared with Pillow.

        With torchvision, transformers' image processors resize differently, and vectors would depend on the machine.
        """
        processor = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        if processor.image_processor is not None and is_torchvision_available():
            options = {"backend": "pil", **kwargs}
            processor.image_processor = AutoImageProcessor.from_pretrained(pretrained_model_name_or_path, **options)
        return processor

    def save_pretrained(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> Any:
        """Save as `ProcessorMixin.save_pretrained` does, with truncation at `model_max_length` in `tokenizer.json`.

        transformers writes the truncation of the last call: none, or another length. The image processor is also saved
        in `preprocessor_config.json`, where other tools look for it.
        """
        if self.image_processor is not None:
            self.image_processor.save_pretrained(save_directory)
        saved = copy.copy(self)
        saved.tokenizer = private_tokenizer(self.tokenizer)
        # transformers saves a side only if it was an argument.
        sides = {name: getattr(saved.tokenizer, name) for name in ("padding_side", "truncation_side")}
        saved.tokenizer.init_kwargs = saved.tokenizer.init_kwargs | sides
        files = super(BifocalProcessor, saved).save_pretrained(save_directory)
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
        """Return a `BatchFeature` with the model's inputs for texts, images or both.

        Args:
            images: one image or several, each of any kind that `load_image` reads; nested lists are flattened.
            text: a string or a list of strings.
            kwargs: options of transformers' processors: `return_tensors`, `padding`, `truncation`, `text_kwargs`...
                Texts are padded and truncated at the tokenizer's `model_max_length` by default.

        Returns:
            `pixel_values` (images, 3, height, width) for images; `input_ids` and `attention_mask` (texts, length) for
            texts.

        Raises:
            ValueError, FileNotFoundError: if an image cannot be read; it is named by its path or position.
        """
        if images is not None:
            images = load_images(list_images(images)[0])
        processor = self
        if text is not None:
            # As `encode_text` does.
            defaults = {name: True for name in ("padding", "truncation") if name not in kwargs}
            kwargs["text_kwargs"] = defaults | kwargs.get("text_kwargs", {})
            processor = copy.copy(self)
            processor.tokenizer = private_tokenizer(self.tokenizer)
        return super(BifocalProcessor, processor).__call__(images=images, text=text, **kwargs)


def image_processor_of_size(size: int, **options: Any) -> CLIPImageProcessorPil:
    """Return CLIP's image processor for square images of one size: it resizes the shorter side, then crops the centre.

    Args:
        size: width and height in pixels.
        options: other settings of `CLIPImageProcessorPil`, such as `image_mean`.
    """
    return CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size}, **options)


def private_tokenizer(tokenizer: Any) -> Any:
    """Return a copy of a tokenizer that shares its vocabulary and rules, but not its truncation and padding.

    The copy pads at the end, as `encode_text` does. Gemma's tokenizer pads at the start, where an encoder with absolute
    positions would number the tokens of a text differently in each batch.

    A fast tokenizer of transformers stores truncation and padding in one shared object, and each call changes them.
    Two threads with different options would get each other's; with a copy for each call they cannot.
    """
    shared = getattr(tokenizer, "backend_tokenizer", None)
    private = copy.copy(tokenizer)
    private.padding_side = "right"
    if shared is None:  # written in Python: options are arguments there
        return private
    own = Tokenizer(shared.model)
    for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        if getattr(shared, part) is not None:
            setattr(own, part, getattr(shared, part))
    added = [token for _, token in sorted(shared.get_added_tokens_decoder().items())]
    for special, group in itertools.groupby(added, key=lambda token: token.special):
        (own.add_special_tokens if special else own.add_tokens)(list(group))
    own.encode_special_tokens = getattr(tokenizer, "split_special_tokens", False)
    private._tokenizer = own
    return private


def token_ids(tokenizer: Any, texts: list[str], max_length: int) -> tuple[list[list[int]], list[int]]:
    """Return the token ids of `tokenizer(texts, truncation=True, max_length=max_length)`, and the lengths without it.

    Args:
        tokenizer: as from `private_tokenizer`.
        texts: strings.
        max_length: longest text in tokens.

    Returns:
        The ids and the number of tokens of each text before truncation; both with special tokens.
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
