# Copyright 2026 The Bifocal authors. Licensed under the Apache License, Version 2.0.
"""`encode_text` and `encode_image`: texts and images to vectors in one call, from any number of threads at once."""

import itertools
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from transformers.utils import logging

from .encoding_options_bifocal import encoding_options, whole_number
from .image_batches_bifocal import ImagePreparer, ImageWorkers, PreparedImage
from .image_bifocal import ImageSource, list_images, refuse_table
from .modeling_bifocal_base import inference_copy
from .packing_bifocal import micro_batches, packs
from .processing_bifocal import BifocalProcessor, private_tokenizer, token_ids

logger = logging.get_logger(__name__)

_PROGRESS_BAR_BATCHES = 20  # number of batches from which a progress bar is shown by default
_TOKENIZED_BATCHES = 32  # batches of texts that are tokenized together and sorted by their tokens
SOURCE_KEYS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
_LOADING = threading.Lock()  # one thread loads a processor, the others wait for it


def _unlock() -> None:
    """Replace the lock in a forked child: the thread that held it exists only in the parent."""
    global _LOADING
    _LOADING = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_unlock)


class EncodingMixin:
    """Adds `encode_text`, `encode_image` and `processor` to a model with `get_text_features`, `get_image_features`."""

    # Provided by the model.
    config: Any
    device: Any
    get_text_features: Callable[..., Any]
    get_image_features: Callable[..., Any]

    _processor: BifocalProcessor | None = None
    _processor_source: tuple[str, dict[str, Any]] | None = None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any) -> Any:
        """Load as `PreTrainedModel.from_pretrained` does, and remember the source for its processor."""
        path = folder_or_id(pretrained_model_name_or_path)
        source = {key: kwargs[key] for key in SOURCE_KEYS if key in kwargs}
        try:
            loaded = super().from_pretrained(path, *model_args, **kwargs)  # type: ignore[misc]
        except OSError as error:
            if path is None or os.path.exists(path):
                raise
            raise OSError(f"'{path}' is not a local folder, and it cannot be loaded from the Hub: {error}") from error
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model._processor_source = (str(path), source)
        return loaded

    @property
    def processor(self) -> BifocalProcessor:
        """The processor that was saved with the model, loaded at first use; or the one that was assigned."""
        if self._processor is None:
            with _LOADING:
                if self._processor is None:
                    self._processor = self._load_processor()
        return self._processor

    @processor.setter
    def processor(self, processor: BifocalProcessor) -> None:
        self._require_own_tokens(processor)
        self._processor = processor

    def _require_own_tokens(self, processor: Any) -> None:
        """Check that the text tower has all tokens of a processor's tokenizer.

        Raises:
            ValueError: if it does not.
        """
        tokenizer, rows = getattr(processor, "tokenizer", None), self.config.text_config.vocab_size
        if tokenizer is not None and len(tokenizer) > rows:
            raise ValueError(
                f"The tokenizer has {len(tokenizer)} tokens, but the text tower knows {rows}, so it belongs to another "
                "model; use the tower's own."
            )

    def _load_processor(self) -> BifocalProcessor:
        if self._processor_source is None:
            raise ValueError(
                "This model was not loaded from a folder or the Hub, so it has no processor; set model.processor = "
                "BifocalProcessor(image_processor, tokenizer) before encoding."
            )
        path, source = self._processor_source
        # If this code runs as remote code, the user has trusted the repository already.
        trusted = type(self).__module__.startswith("transformers_modules.")
        try:
            processor = BifocalProcessor.from_pretrained(path, trust_remote_code=trusted, **source)
            self._require_own_tokens(processor)
            return processor
        except (OSError, ValueError) as error:
            missing = os.path.isdir(path) and not os.path.exists(os.path.join(path, "processor_config.json"))
            reason = "there is no processor_config.json" if missing else error
            raise ValueError(
                f"The processor in '{path}' cannot be loaded ({reason}). Save one there with "
                "processor.save_pretrained, or set model.processor."
            ) from error

    def encode_text(
        self,
        texts: str | Sequence[str],
        *,
        batch_size: int = 32,
        max_length: int | None = None,
        truncate_dim: int | None = None,
        normalize: bool | None = None,
        convert_to: str | None = None,
        show_progress: bool | None = None,
        **aliases: Any,
    ) -> Any:
        """Embed texts. Several threads may call this at once, also while another one trains the model.

        Args:
            texts: a string or several (a list, array, Series or any other iterable of strings).
            batch_size: texts per forward pass; texts are sorted by length to avoid padding. (On a CPU, the text tower
                splits large batches into micro-batches.)
            max_length: longest text in tokens, special tokens included; the model's maximum when None. Longer texts are
                truncated, with one warning that counts them.
            truncate_dim: number of leading dimensions to keep (Matryoshka, arXiv 2205.13147); all when None.
            normalize: whether vectors (after truncation) are scaled to length 1; True when None.
            convert_to: "numpy", "torch" (on the model's device) or "list"; "numpy" when None.
            show_progress: whether to show a progress bar; if None, from 20 batches on.
            aliases: names of sentence-transformers and Jina CLIP: `normalize_embeddings`, `convert_to_numpy`,
                `convert_to_tensor`, `show_progress_bar`, `prompt` (prepended to each text), `prompt_name` or `task`
                (one of `config.prompts`), and `device`, if it is the model's.

        Returns:
            Vectors (texts, dimensions) in float32 and in the order of the texts; (dimensions,) for a single string.
            Empty texts have a vector, too; one warning counts them.

        Raises:
            ValueError: if there are no texts, a text is not a string or not valid Unicode (the message has its
                position), the argument is a table, or an option is not valid.
            TypeError: if an option does not exist.
        """
        options = encoding_options(self, "encode_text", truncate_dim, normalize, convert_to, show_progress, aliases)
        batch_size = whole_number("batch_size", batch_size, 1)
        items, single = _list_texts(texts, self._prompt(aliases))
        tokenizer = private_tokenizer(self.processor.tokenizer)
        special = tokenizer.num_special_tokens_to_add()
        maximum = self.config.max_text_length
        if max_length is None:
            max_length = min(maximum, tokenizer.model_max_length)
        limit = whole_number("max_length", max_length, special + 1, maximum, " tokens")
        padding = tokenizer.pad_token_id or 0
        too_long = empty = 0

        def embedded(model: Any) -> Iterator[tuple[Sequence[int], torch.Tensor]]:
            nonlocal too_long, empty
            order = sorted(range(len(items)), key=lambda position: -len(items[position]))
            for start in range(0, len(order), _TOKENIZED_BATCHES * batch_size):
                chosen = order[start : start + _TOKENIZED_BATCHES * batch_size]
                rows, lengths = token_ids(tokenizer, [items[position] for position in chosen], limit)
                too_long += sum(length > limit for length in lengths)
                empty += sum(length <= special for length in lengths)
                ids = dict(zip(chosen, rows, strict=True))
                chosen.sort(key=lambda position: -len(ids[position]))
                for first in range(0, len(chosen), batch_size):
                    batch = chosen[first : first + batch_size]
                    parts = self._parts(model, [len(ids[position]) for position in batch])
                    inputs = (_padded([ids[batch[n]] for n in part], padding, self.device) for part in parts)
                    vectors = [model.get_text_features(*part).pooler_output for part in inputs]
                    yield [batch[n] for part in parts for n in part], torch.cat(vectors)

        encoded = self._encode(len(items), embedded, batch_size, single, "texts", *options)
        if too_long:
            texts_are = "The text is" if single else f"{too_long} of {len(items)} texts are"
            logger.warning(f"{texts_are} longer than {limit} tokens; only the beginning is encoded.")
        if empty:
            texts_are = "The text is" if single else f"{empty} of {len(items)} texts are"
            logger.warning(f"{texts_are} empty or blank; all such texts have the same vector.")
        return encoded

    def encode_query(self, texts: str | Sequence[str], **options: Any) -> Any:
        """Embed queries as `encode_text` does, by default with the prompt "query" if the model has one."""
        return self.encode_text(texts, **_with_prompt("query", self.config.prompts, options))

    def encode_document(self, texts: str | Sequence[str], **options: Any) -> Any:
        """Embed documents as `encode_text` does, by default with the prompt "document" if the model has one."""
        return self.encode_text(texts, **_with_prompt("document", self.config.prompts, options))

    def encode_image(
        self,
        images: ImageSource | Sequence[ImageSource],
        *,
        batch_size: int = 32,
        truncate_dim: int | None = None,
        normalize: bool | None = None,
        convert_to: str | None = None,
        show_progress: bool | None = None,
        num_workers: int | None = None,
        fast_decoding: bool = False,
        **aliases: Any,
    ) -> Any:
        """Embed images. Several threads may call this at once, also while another one trains the model.

        Args:
            images: one image or several, each a path, URL, data URI, base64, bytes, file object, dict with `bytes` or
                `path`, Pillow image or array (see `load_image`); nested lists are flattened. Files are read while they
                are needed, at most about a batch ahead.
            batch_size: images per forward pass.
            truncate_dim, normalize, convert_to, show_progress, aliases: as for `encode_text`.
            num_workers: threads that decode and resize images ahead of the model; 0 for none. If None, the number of
                cores this process may use, 16 at most. Vectors do not depend on it.
            fast_decoding: decode JPEG files at a half, a quarter or an eighth of their size where the image tower needs
                no more. Much faster for large photos, but vectors differ slightly.

        Returns:
            Vectors (images, dimensions) in float32 and in the order of the images; (dimensions,) for a single image.

        Raises:
            ValueError, FileNotFoundError: if there are no images, one cannot be read (the message names it), the
                argument is a table, or an option is not valid.
            TypeError: if an option does not exist.
        """
        options = encoding_options(self, "encode_image", truncate_dim, normalize, convert_to, show_progress, aliases)
        batch_size = whole_number("batch_size", batch_size, 1)
        items, single = list_images(images)
        preparer = self.image_preparer(fast_decoding)
        in_turn = all(isinstance(item, PreparedImage) for item in items)
        with ImageWorkers(0 if in_turn else num_workers, len(items)) as workers:

            def embedded(model: Any) -> Iterator[tuple[Sequence[int], torch.Tensor]]:
                prepared = workers.map(preparer.load, enumerate(items), preparer.images_ahead(batch_size))
                for start in range(0, len(items), batch_size):
                    rows = range(start, min(start + batch_size, len(items)))
                    pixels = preparer.pixel_values(itertools.islice(prepared, len(rows)), len(rows), self.device)
                    yield rows, model.get_image_features(pixels, pooled_only=True).pooler_output

            return self._encode(len(items), embedded, batch_size, single, "images", *options)

    def image_preparer(self, fast_decoding: bool = False) -> ImagePreparer:
        """Return what decodes and resizes images as `encode_image` does, which also embeds the images it prepares.

        Args:
            fast_decoding: as for `encode_image`.
        """
        return ImagePreparer(self.processor.image_processor, fast_decoding)

    def _parts(self, model: Any, lengths: list[int]) -> list[list[int]]:
        """Return the texts of a batch in groups that are embedded one after the other; on a CPU, they fit its caches.

        Args:
            model: this model as it is used.
            lengths: tokens of each text.
        """
        if self.device.type != "cpu":
            return [list(range(len(lengths)))]
        if self.config.text_padding == "max_length":
            lengths = [self.config.max_text_length] * len(lengths)
        # Bifocal's text tower computes no padding, unless a hook watches; others pad each group to its longest text.
        computes_padding = getattr(model.text_model, "computes_padding", None)
        return micro_batches(lengths) if computes_padding is None or computes_padding() else packs(lengths)

    def _prompt(self, aliases: dict[str, Any]) -> str | None:
        """Return the text that goes before each text, by `prompt`, `prompt_name` or `task`."""
        names = [aliases[key] for key in ("prompt_name", "task") if aliases.get(key) is not None]
        if not names:
            return aliases.get("prompt")
        known = self.config.prompts
        if names[0] not in known:
            listed = f"it has {', '.join(map(repr, known))}" if known else "it has none"
            raise ValueError(f"This model has no prompt '{names[0]}'; {listed}.")
        if aliases.get("prompt") is not None or len(set(names)) > 1:
            raise ValueError("prompt, prompt_name and task contradict each other; give one of them.")
        return known[names[0]]

    def _encode(
        self,
        count: int,
        embedded: Callable[[Any], Iterator[tuple[Sequence[int], torch.Tensor]]],
        batch_size: int,
        single: bool,
        what: str,
        truncate_dim: int | None,
        normalize: bool,
        convert_to: str,
        show_progress: bool | None,
    ) -> Any:
        """Return the vectors in the order of their positions; `embedded` yields positions and vectors of each batch."""
        if not count:
            raise ValueError(f"There are no {what} to encode; give at least one.")
        batches = -(-count // batch_size)
        hide = not (batches >= _PROGRESS_BAR_BATCHES if show_progress is None else show_progress)
        vectors: list[torch.Tensor] = [torch.empty(0)] * count
        # no_grad and not inference_mode: its tensors could never enter a later loss.
        with torch.no_grad():
            work = embedded(inference_copy(self))
            for positions, embeddings in logging.tqdm(
                work, total=batches, desc=f"Encoding {what}", unit="batch", disable=hide
            ):
                batch = embeddings.float()[:, :truncate_dim]
                if normalize:
                    batch = torch.nn.functional.normalize(batch, dim=-1)
                for position, vector in zip(positions, batch, strict=True):
                    vectors[position] = vector
        if convert_to == "tensors":
            return vectors[0] if single else vectors
        stacked = vectors[0] if single else torch.stack(vectors)
        if convert_to == "torch":
            return stacked
        return stacked.cpu().numpy() if convert_to == "numpy" else stacked.tolist()


def folder_or_id(path: Any) -> Any:
    """Return a model's folder, with `~` expanded, or its Hub id.

    Raises:
        OSError: if it can only be a folder and does not exist; transformers' own error would mention the Hub.
    """
    if not isinstance(path, str | os.PathLike):
        return path
    text = os.path.expanduser(os.fspath(path))
    only_a_path = os.path.isabs(text) or text.startswith(".") or text.count("/") > 1 or "\\" in text
    if only_a_path and not os.path.exists(text):
        raise OSError(f"The folder '{path}' does not exist; check the path.")
    return text


def _list_texts(texts: Any, prompt: str | None) -> tuple[list[str], bool]:
    """Return the texts as a list with the prompt prepended, and whether the argument was a single text."""
    refuse_table(texts, "texts", ("text", "caption", "sentence", "query", "title", "description"))
    if isinstance(texts, np.ndarray) and not texts.ndim:
        texts = texts.item()
    single = isinstance(texts, str)
    if not single and (isinstance(texts, bytes | bytearray) or not hasattr(texts, "__iter__")):
        raise ValueError(f"texts is a {type(texts).__name__}; give a string or several.")
    items = [texts] if single else list(texts)
    for position, text in enumerate(items):
        if not isinstance(text, str):
            raise ValueError(f"Text {position} is a {type(text).__name__}, not a string; convert or remove it.")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"Text {position} holds half a surrogate pair at character {error.start}, which is not valid Unicode. "
                "Repair it, or remove it with text.encode('utf-8', 'ignore').decode()."
            ) from error
    if not isinstance(prompt, str | None):
        raise ValueError(f"prompt is a {type(prompt).__name__}; give a string.")
    return [prompt + text for text in items] if prompt else items, single


def _with_prompt(name: str, prompts: dict[str, str], options: dict[str, Any]) -> dict[str, Any]:
    """Return the options of `encode_text` with a prompt by its name, unless they choose one or there is none."""
    chosen = any(options.get(key) is not None for key in ("prompt", "prompt_name", "task"))
    return options if chosen or name not in prompts else {**options, "prompt_name": name}


def _padded(rows: list[list[int]], padding: int, device: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids and attention mask (rows, longest) on the model's device, padded at the end."""
    ids = torch.full((len(rows), max(1, max(map(len, rows)))), padding)
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(rows):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
    return ids.to(device), mask.to(device)
