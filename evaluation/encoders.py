"""Any model behind one interface: joint models, sentence-transformers, and other dual encoders of transformers."""

import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModel, AutoProcessor
from transformers.utils import logging
from transformers.utils.hub import cached_file

from bifocal.data.vector_cache import BATCHES_AT_ONCE, VectorCache, slices
from bifocal.embedding.fingerprint import model_fingerprint
from bifocal.embedding.models import EmbeddingModel, load_model
from bifocal.errors import EvaluationError, ModelError, first_line
from bifocal.evaluation.arguments import is_local_model
from bifocal.modeling import BifocalModel, load_image
from bifocal.modeling.dtype_bifocal import default_device, dtype_name, loading_options, resolve_dtype
from bifocal.modeling.image_batches_bifocal import EmbeddedImages, ImagePreparer, ImageWorkers, embed_ahead
from bifocal.modeling.loading_bifocal import UnsupportedFamilyError, load_complete, require_vocabulary
from bifocal.modeling.towers_bifocal import longest_text, padded_length

logger = logging.get_logger(__name__)
Encode = Callable[[list[Any]], np.ndarray]


@dataclass
class Encoder:
    """A model that embeds texts, images or both.

    Args:
        name: name of the model, for tables.
        family: "Bifocal", "sentence-transformers" or "transformers".
        text, image: functions from a list to (number, dimensions) unit vectors in float32; None if the model cannot
            embed texts or images.
        parameters: number of parameters.
        batch_size: texts or images per forward pass.
        query, document: functions for the queries and the documents of a search, if the model embeds them in another
            way than other texts, by a prompt for example.
        prompts: the prompts of `query` and `document`, for reports.
        work: number of inputs embedded so far, and the seconds that took, by "texts" and "images".
        dtype: dtype of the weights, such as "float32".
        num_workers: threads that decode and resize images ahead of the model; see `BifocalModel.encode_image`.
        fast_decoding: whether large JPEGs are decoded at reduced scale; see `BifocalModel.encode_image`.
        preparer: returns from `fast_decoding` what prepares images, for a model that resizes in the threads, too.
        cache: keeps the vectors of collections that are larger than what is written at once, so that a killed run
            resumes; None for no cache.
        fingerprint: returns a hash of all that decides the vectors besides their inputs, see `model_fingerprint`. It is
            called for each collection, as a model may be trained meanwhile. None if that is not known: then the cache
            is not used.
    """

    name: str
    family: str
    text: Encode | None
    image: Encode | None
    parameters: int
    batch_size: int = 64
    query: Encode | None = None
    document: Encode | None = None
    prompts: dict[str, str] = field(default_factory=dict)
    work: dict[str, tuple[int, float]] = field(default_factory=dict)
    dtype: str = ""
    num_workers: int | None = None
    fast_decoding: bool = False
    preparer: Callable[[bool], ImagePreparer] | None = None
    cache: VectorCache | None = None
    fingerprint: Callable[[], str] | None = None

    def speed(self) -> dict[str, float]:
        """Return the texts and images embedded per second since the last call."""
        rates = {f"{what}_per_second": count / max(seconds, 1e-9) for what, (count, seconds) in self.work.items()}
        self.work = {}
        return rates

    def texts(self, texts: Sequence[str], prompt_name: str | None = None) -> np.ndarray:
        """Return (number, dimensions) unit vectors of texts.

        Args:
            texts: the texts.
            prompt_name: "query" or "document" for the texts of a search; None for others.

        Raises:
            EvaluationError: if the model embeds no texts, or some embeddings are not finite.
            DataError: as `VectorCache.vectors`.
        """
        of_search = {"query": self.query, "document": self.document}.get(prompt_name or "")
        encode = of_search or self.text
        items = _as_list("texts", texts)
        if len(items) <= self._rows_at_once:
            return self._embed("texts", encode, items)

        def embed(rows: slice) -> np.ndarray:
            return self._embed("texts", encode, items[rows], rows.start)

        if not self._caches(len(items)):  # in the same batches as with a cache, and so to the bit the same vectors
            return np.concatenate([embed(rows) for rows in slices(len(items), self._rows_at_once)])
        identity = [prompt_name or "" if of_search is not None else "", *items]
        return np.array(
            self._cached("texts", identity, len(items), lambda rows: dict(enumerate(embed(rows), rows.start)))
        )

    def images(self, images: Sequence[Any]) -> np.ndarray:
        """Return (number, dimensions) unit vectors of images.

        Args:
            images: images in any form that `load_image` reads.

        Raises:
            EvaluationError: if the model embeds no images, or some embeddings are not finite.
        """
        return self._embed("images", self.image, _as_list("images", images))

    @property
    def decodes_fast(self) -> bool:
        """Whether large JPEGs are decoded at reduced scale: it was chosen, and the image processor allows it."""
        return self.fast_decoding and self.preparer is not None and self.preparer(True).smallest_side is not None

    def images_ahead(
        self, sources: Iterable[Any], read: Callable[[ImagePreparer, Any], tuple[Any, Any]]
    ) -> EmbeddedImages:
        """Read images in threads ahead of the model, and yield a note and a unit vector for each, in order.

        The time that counts for `speed` includes decoding.

        Args:
            sources: what is read.
            read: returns a note and the prepared image of a source, or None instead of one that is not embedded.

        Raises:
            EvaluationError: if the model embeds no images, or some embeddings are not finite.
        """
        preparer = self._image_preparer()
        _, seconds = self.work.get("images", (0, 0.0))
        started = time.monotonic()
        ahead = embed_ahead(sources, partial(read, preparer), self.images, preparer, self.batch_size, self.num_workers)
        with closing(ahead) as embedded:
            yield from embedded
        count, _ = self.work.get("images", (0, 0.0))
        self.work["images"] = (count, seconds + time.monotonic() - started)

    def notes_ahead(
        self, sources: Iterable[Any], read: Callable[[ImagePreparer, Any], Any]
    ) -> Generator[Any, None, None]:
        """Read images in threads, and yield what `read` returns for each, in order. Nothing is embedded."""
        preparer = self._image_preparer()
        with ImageWorkers(self.num_workers) as workers:
            yield from workers.map(partial(read, preparer), sources, preparer.images_ahead(self.batch_size))

    def cached_images(
        self, contents: Iterable[str | None], count: int, embed: Callable[[slice], Mapping[int, np.ndarray]]
    ) -> np.ndarray | None:
        """Return the vectors of images from the cache, as `VectorCache.vectors`; None if they are not cached.

        Args:
            contents: a hash of each image's content; None for an image whose content is not known before it is read.
            count: number of images.
            embed: returns the vectors of some images by number.
        """
        if not self._caches(count):
            return None
        known = [content for content in contents if content is not None]
        if len(known) < count:
            logger.warning_once(
                f"The vectors of {count:,} images are not cached: {count - len(known):,} of them are neither bytes nor "
                "local files."
            )
            return None
        return self._cached("images", ["fast" if self.decodes_fast else "", *known], count, embed)

    @property
    def _rows_at_once(self) -> int:
        return BATCHES_AT_ONCE * self.batch_size

    def _caches(self, count: int) -> bool:
        """Return whether a collection is cached: a smaller one would be embedded as a whole after it was killed."""
        return self.cache is not None and self.fingerprint is not None and count > self._rows_at_once

    def _cached(
        self, what: str, identity: Sequence[str], count: int, embed: Callable[[slice], Mapping[int, np.ndarray]]
    ) -> np.ndarray:
        assert self.cache is not None
        assert self.fingerprint is not None
        return self.cache.vectors(what, [self.fingerprint(), *identity], count, embed, self._rows_at_once)

    def _image_preparer(self) -> ImagePreparer:
        return ImagePreparer() if self.preparer is None else self.preparer(self.fast_decoding)

    def _embed(self, what: str, encode: Encode | None, items: list[Any], first: int = 0) -> np.ndarray:
        if encode is None:
            raise EvaluationError(f"'{self.name}' embeds no {what}; evaluate it on other tasks.")
        started = time.monotonic()
        vectors = np.asarray(encode(items), dtype=np.float32)
        count, seconds = self.work.get(what, (0, 0.0))
        self.work[what] = (count + len(items), seconds + time.monotonic() - started)
        finite = np.isfinite(vectors).all(axis=1)
        if not finite.all():
            raise EvaluationError(
                f"'{self.name}' gives embeddings that are not finite for {(~finite).sum()} of {len(items)} {what}, "
                f"first number {first + int(np.argmin(finite))}; check its weights and the dtype it is loaded in."
            )
        return vectors


def _as_list(what: str, inputs: Sequence[Any]) -> list[Any]:
    if isinstance(inputs, str | bytes):
        raise EvaluationError(f"The {what} to embed are a single {type(inputs).__name__}; give a list.")
    return list(inputs)


def require_model(path: str) -> None:
    """Check that a model exists, before any data is read.

    Args:
        path: local folder or Hub id.

    Raises:
        EvaluationError: if the path is neither a folder with a model nor the id of a model on the Hub.
    """
    if is_local_model(path):
        return
    try:
        exists = _has(path, "config.json") or _has(path, "modules.json")
        reason = "it has neither config.json nor modules.json"
    except Exception as error:  # no such repository, no connection, an invalid name
        exists, reason = False, first_line(error)
    if not exists:
        raise EvaluationError(f"There is no model folder '{path}' here, and no such model on the Hub ({reason}).")


def load_encoder(path: str, batch_size: int = 64, device: str | None = None, dtype: str | None = None) -> Encoder:
    """Load a model: a dual encoder (Bifocal, CLIP, SigLIP, ALIGN, ...) or one of sentence-transformers.

    Args:
        path: local folder or Hub id.
        batch_size: texts or images per forward pass.
        device: "cpu", "cuda", ... If None, a GPU if there is one.
        dtype: one of `DTYPE_CHOICES`; "model", the dtype of its weights, when None.

    Raises:
        EvaluationError: if there is no such model, it cannot be loaded, or it is of another kind.
    """
    require_model(path)
    path = str(Path(path).expanduser()) if path.startswith("~") else path
    try:
        encoder = _encoder(load_model(path, dtype, device), _name(path), batch_size)
    except UnsupportedFamilyError:
        encoder = _other_dual_encoder(path, batch_size, device or default_device(), dtype)
    except ModelError as error:
        raise EvaluationError(str(error)) from error
    assert encoder.fingerprint is not None
    encoder.fingerprint = cache(encoder.fingerprint)  # nothing else has this model, so it does not change
    return encoder


def bifocal_encoder(model: BifocalModel, name: str, batch_size: int = 64) -> Encoder:
    """Return an encoder of a loaded joint model.

    Args:
        model: the model.
        name: name of the model, for tables.
        batch_size: texts or images per forward pass.
    """
    return _encoder(EmbeddingModel(name, model), name, batch_size)


def _encoder(embedding: EmbeddingModel, name: str, batch_size: int) -> Encoder:
    """Return an encoder of a joint model, or of one of sentence-transformers."""
    model = embedding.model

    def texts(role: str) -> Encode:
        return lambda inputs: embedding.encode_text(inputs, role, None, batch_size)

    def images(inputs: list[Any]) -> np.ndarray:
        return embedding.encode_image(inputs if embedding.is_joint else list(map(load_image, inputs)), batch_size)

    family = "Bifocal" if embedding.is_joint else "sentence-transformers"
    encoder = Encoder(
        name, family, texts(""), images if embedding.embeds_images else None, _parameters(model), batch_size,
        prompts=embedding.prompts, dtype=dtype_name(model), fingerprint=partial(model_fingerprint, model),
    )  # fmt: skip
    if embedding.is_joint:
        encoder.preparer = embedding.image_preparer
    if encoder.prompts or (not embedding.is_joint and _searches_differ(model)):
        encoder.query, encoder.document = texts("query"), texts("document")
    return encoder


def _searches_differ(model: Any) -> bool:
    """Return whether a `SentenceTransformer` without prompts embeds the texts of a search in another way."""
    from sentence_transformers.base.modules import Router

    return model.default_prompt_name is not None or any(isinstance(module, Router) for module in model)


def _other_dual_encoder(path: str, batch_size: int, device: str, dtype: str | None) -> Encoder:
    """Load a dual encoder of a family that `BifocalModel` does not know, such as ALIGN."""
    try:
        options = loading_options(resolve_dtype(dtype, device), device)
        model = load_complete(AutoModel, path, **options).to(device).eval()
        processor = AutoProcessor.from_pretrained(path)
        require_vocabulary(processor.tokenizer, path)
    except Exception as error:  # configuration, weights, tokenizer: each library has its own errors
        raise EvaluationError(f"The model '{path}' cannot be loaded ({first_line(error)}).") from error
    return encoder_of(model, processor, _name(path), batch_size)


def encoder_of(model: Any, processor: Any, name: str, batch_size: int = 64) -> Encoder:
    """Return an encoder of a loaded model, with adapters or without: a Bifocal model, or another dual encoder.

    Args:
        model: the model.
        processor: processor of a transformers model.
        name: name of the model, for tables.
        batch_size: texts or images per forward pass.

    Raises:
        EvaluationError: if the model does not embed texts and images into one space, or has no processor.
    """
    if hasattr(model, "encode_text") and hasattr(model, "encode_image"):
        return bifocal_encoder(model, name, batch_size)
    if not hasattr(model, "get_text_features") or not hasattr(model, "get_image_features"):
        raise EvaluationError(
            f"A {type(model).__name__} cannot be evaluated here: it has neither encode_text and encode_image nor "
            "get_text_features and get_image_features."
        )
    if processor is None:
        raise EvaluationError(f"To evaluate a {type(model).__name__}, give its processor (processor=...).")
    full_length = padded_length(model.config)
    limit = full_length or _longest(model.config, processor.tokenizer)
    padding = "longest" if full_length is None else "max_length"

    def text(texts: list[str]) -> Any:
        inputs = processor(text=texts, truncation=True, max_length=limit, padding=padding, return_tensors="pt")
        if full_length is not None:
            inputs.pop("attention_mask", None)
        return model.get_text_features(**inputs.to(model.device))

    def image(images: list[Any]) -> Any:
        inputs = processor(images=[load_image(value) for value in images], return_tensors="pt").to(model.device)
        floats = {name: value.to(model.dtype) for name, value in inputs.items() if torch.is_floating_point(value)}
        return model.get_image_features(**{**inputs, **floats})

    def batched(embed: Callable[[list[Any]], Any]) -> Encode:
        @torch.inference_mode()
        def encode(inputs: list[Any]) -> np.ndarray:
            parts = []
            for start in range(0, len(inputs), batch_size):
                vectors = embed(inputs[start : start + batch_size])
                vectors = getattr(vectors, "pooler_output", vectors).float()
                parts.append(torch.nn.functional.normalize(vectors, dim=-1).cpu().numpy())
            return np.concatenate(parts)

        return encode

    return Encoder(
        name, "transformers", batched(text), batched(image), _parameters(model), batch_size, dtype=dtype_name(model),
        fingerprint=partial(model_fingerprint, model, processor),
    )  # fmt: skip


def _longest(config: Any, tokenizer: Any) -> int:
    """Return the longest text in tokens; that of the tokenizer if the configuration does not say."""
    text_config = getattr(config, "text_config", None)
    limit = tokenizer.model_max_length
    return limit if text_config is None else min(limit, longest_text(text_config))


def _parameters(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _has(path: str, name: str) -> bool:
    return cached_file(path, name, _raise_exceptions_for_missing_entries=False) is not None


def _name(path: str) -> str:
    """Return the last two parts of a local path, such as `demo/model` for `runs/demo/model`; a Hub id as it is."""
    if Path(path).exists():
        return "/".join(Path(path).absolute().parts[-2:])
    return path
