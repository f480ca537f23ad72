# Copyright 2026 The Bifocal authors. Licensed under the Apache License, Version 2.0.
"""`encode_text` and `encode_image`: from strings and pictures to vectors in one call."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.utils import logging

from .image_bifocal import ImageSource, load_image
from .processing_bifocal import BifocalProcessor

logger = logging.get_logger(__name__)

# Batches from which a progress bar is shown unless the caller decides.
_LONG_WORK = 20
# Batches of texts that are tokenized at once, and sorted by their tokens.
_TOKENIZED = 32
_SOURCE_KEYS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


class EncodingMixin:
    """Adds `encode_text`, `encode_image` and `processor` to a model with `get_text_features`, `get_image_features`."""

    # What the model brings.
    config: Any
    device: Any
    training: bool
    train: Callable[..., Any]
    eval: Callable[..., Any]
    get_text_features: Callable[..., Any]
    get_image_features: Callable[..., Any]

    _processor: BifocalProcessor | None = None
    _processor_source: tuple[str, dict[str, Any]] | None = None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any) -> Any:
        """As `PreTrainedModel.from_pretrained`; remembers where the model came from, so that its processor is found."""
        source = {key: kwargs[key] for key in _SOURCE_KEYS if key in kwargs}
        loaded = super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)  # type: ignore[misc]
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model._processor_source = (str(pretrained_model_name_or_path), source)
        return loaded

    @property
    def processor(self) -> BifocalProcessor:
        """The processor saved beside the model, loaded at first use; or the one set by hand."""
        if self._processor is None:
            if self._processor_source is None:
                raise ValueError(
                    "This model was not loaded from a folder or the Hub, so it has no processor; set model.processor = "
                    "BifocalProcessor(image_processor, tokenizer) before encoding."
                )
            path, source = self._processor_source
            # Where this very code runs as remote code, the user has trusted the repository already.
            trusted = type(self).__module__.startswith("transformers_modules.")
            try:
                self._processor = BifocalProcessor.from_pretrained(path, trust_remote_code=trusted, **source)
            except (OSError, ValueError) as error:
                raise ValueError(
                    f"'{path}' holds no processor beside the model ({error}); save one there with "
                    "processor.save_pretrained, or set model.processor."
                ) from error
        return self._processor

    @processor.setter
    def processor(self, processor: BifocalProcessor) -> None:
        self._processor = processor

    def encode_text(
        self,
        texts: str | Sequence[str],
        *,
        batch_size: int = 32,
        max_length: int | None = None,
        truncate_dim: int | None = None,
        normalize: bool = True,
        convert_to: str = "numpy",
        show_progress: bool | None = None,
    ) -> Any:
        """Embed texts.

        Args:
            texts: a string or several.
            batch_size: texts per forward pass; they are sorted by length first, so that little is padded. (On a CPU the
                text tower itself takes a large batch in pieces.)
            max_length: tokens to keep of a text, special tokens included; the model's own maximum when None. Longer
                texts are cut, with one warning that counts them.
            truncate_dim: keep the first so many dimensions (Matryoshka, arXiv 2205.13147); all when None.
            normalize: make the vectors (after truncation) of length 1.
            convert_to: "numpy", "torch" (on the model's device) or "list".
            show_progress: a progress bar; None shows one from 20 batches on.

        Returns:
            (texts, dimensions) in float32 and the order given; one vector (dimensions,) for a single string.

        Raises:
            ValueError: no texts, a text that is empty or no string (named by its position), or a bad option.
        """
        single = isinstance(texts, str)
        items = [texts] if single else list(texts)
        for position, text in enumerate(items):
            if not isinstance(text, str):
                raise ValueError(f"Text {position} is a {type(text).__name__}, not a string; convert or remove it.")
            if not text.strip():
                raise ValueError(f"Text {position} is empty; remove it or give it words.")
        limit = self.config.text_config.max_position_embeddings
        if max_length is None:
            max_length = min(limit, self.processor.tokenizer.model_max_length)
        elif not 3 <= max_length <= limit:
            raise ValueError(f"max_length is {max_length}, but this model takes from 3 to {limit} tokens.")
        too_long = 0

        def embedded() -> Iterator[tuple[Sequence[int], torch.Tensor]]:
            nonlocal too_long
            tokenizer = self.processor.tokenizer
            order = sorted(range(len(items)), key=lambda position: -len(items[position]))
            for start in range(0, len(order), _TOKENIZED * batch_size):
                chosen = order[start : start + _TOKENIZED * batch_size]
                tokens = tokenizer([items[position] for position in chosen], truncation=True, max_length=max_length)
                ids = dict(zip(chosen, tokens["input_ids"], strict=True))
                full = [items[position] for position in chosen if len(ids[position]) >= max_length]
                if full:
                    whole = tokenizer(full, truncation=False, verbose=False)["input_ids"]
                    too_long += sum(len(one) > max_length for one in whole)
                chosen.sort(key=lambda position: -len(ids[position]))
                for first in range(0, len(chosen), batch_size):
                    batch = chosen[first : first + batch_size]
                    inputs = self._padded([ids[position] for position in batch])
                    yield batch, self.get_text_features(*inputs).pooler_output

        options = (truncate_dim, normalize, convert_to, show_progress)
        encoded = self._encode(len(items), embedded, batch_size, single, "texts", *options)
        if too_long:
            logger.warning(
                f"{too_long} of {len(items)} texts are longer than {max_length} tokens; only their beginning is "
                "encoded."
            )
        return encoded

    def _padded(self, rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and attention mask (rows, longest) on the model's device, padded at the end."""
        ids = torch.full((len(rows), max(map(len, rows))), self.processor.tokenizer.pad_token_id or 0)
        mask = torch.zeros_like(ids)
        for row, tokens in enumerate(rows):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            mask[row, : len(tokens)] = 1
        return ids.to(self.device), mask.to(self.device)

    def encode_image(
        self,
        images: ImageSource | Sequence[ImageSource],
        *,
        batch_size: int = 32,
        truncate_dim: int | None = None,
        normalize: bool = True,
        convert_to: str = "numpy",
        show_progress: bool | None = None,
    ) -> Any:
        """Embed pictures.

        Args:
            images: a picture or several, each a path, URL, data URI, bytes, Pillow image or array (`load_image`). They
                are read batch by batch.
            batch_size, truncate_dim, normalize, convert_to, show_progress: as for `encode_text`.

        Returns:
            (images, dimensions) in float32 and the order given; one vector (dimensions,) for a single picture.

        Raises:
            ValueError, FileNotFoundError: no pictures, one that cannot be read (named), or a bad option.
        """
        single = isinstance(images, str | Path | bytes | Image.Image)
        if isinstance(images, np.ndarray | torch.Tensor):
            single = images.ndim < 4
        items: list[Any] = [images] if single else list(images)  # type: ignore[arg-type]

        def embedded() -> Iterator[tuple[Sequence[int], torch.Tensor]]:
            for start in range(0, len(items), batch_size):
                positions = range(start, min(start + batch_size, len(items)))
                pictures = []
                for position in positions:
                    named = isinstance(items[position], str | Path)
                    pictures.append(load_image(items[position], None if named else f"Image {position}"))
                inputs = self.processor.image_processor(pictures, return_tensors="pt")
                yield positions, self.get_image_features(inputs["pixel_values"].to(self.device)).pooler_output

        options = (truncate_dim, normalize, convert_to, show_progress)
        return self._encode(len(items), embedded, batch_size, single, "images", *options)

    def _encode(
        self,
        count: int,
        embedded: Callable[[], Iterator[tuple[Sequence[int], torch.Tensor]]],
        batch_size: int,
        single: bool,
        what: str,
        truncate_dim: int | None,
        normalize: bool,
        convert_to: str,
        show_progress: bool | None,
    ) -> Any:
        """Collect what `embedded` yields, the positions of a batch and its vectors, in the order of positions."""
        width = self.config.projection_dim
        if not count:
            raise ValueError(f"There are no {what} to encode; give at least one.")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, but it is {batch_size}.")
        if truncate_dim is not None and not 1 <= truncate_dim <= width:
            raise ValueError(
                f"truncate_dim must be from 1 to {width}, the model's dimension, but it is {truncate_dim}."
            )
        if convert_to not in ("numpy", "torch", "list"):
            raise ValueError(f"convert_to must be 'numpy', 'torch' or 'list', but it is '{convert_to}'.")
        batches = -(-count // batch_size)
        hide = not (batches >= _LONG_WORK if show_progress is None else show_progress)
        vectors: list[torch.Tensor] = [torch.empty(0)] * count
        was_training = self.training
        self.eval()
        try:
            # no_grad and not inference_mode: its tensors could never enter a later loss.
            with torch.no_grad():
                bar = logging.tqdm(embedded(), total=batches, desc=f"Encoding {what}", unit="batch", disable=hide)
                for positions, found in bar:
                    batch = found.float()[:, :truncate_dim]
                    if normalize:
                        batch = torch.nn.functional.normalize(batch, dim=-1)
                    for position, vector in zip(positions, batch, strict=True):
                        vectors[position] = vector
        finally:
            self.train(was_training)
        stacked = vectors[0] if single else torch.stack(vectors)
        if convert_to == "torch":
            return stacked
        return stacked.cpu().numpy() if convert_to == "numpy" else stacked.tolist()
