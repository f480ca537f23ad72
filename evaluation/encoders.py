"""Any model behind one interface: Bifocal, sentence-transformers, CLIP and SigLIP."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModel, AutoProcessor
from transformers.utils.hub import cached_file

from bifocal.errors import EvaluationError, first_line, looks_like_path
from bifocal.modeling import BifocalModel, load_image
from bifocal.modeling.towers_bifocal import padded_length


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
        work: number of inputs embedded so far, and the seconds that took, by "texts" and "images".
    """

    name: str
    family: str
    text: Callable[[list[str]], np.ndarray] | None
    image: Callable[[list[Any]], np.ndarray] | None
    parameters: int
    batch_size: int = 64
    work: dict[str, tuple[int, float]] = field(default_factory=dict)

    def speed(self) -> dict[str, float]:
        """Return the texts and images embedded per second since the last call."""
        rates = {f"{what}_per_second": count / max(seconds, 1e-9) for what, (count, seconds) in self.work.items()}
        self.work = {}
        return rates

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """Return (number, dimensions) unit vectors of texts.

        Raises:
            EvaluationError: if the model embeds no texts, or some embeddings are not finite.
        """
        return self._embed("texts", self.text, texts)

    def images(self, images: Sequence[Any]) -> np.ndarray:
        """Return (number, dimensions) unit vectors of images.

        Args:
            images: images in any form that `load_image` reads.

        Raises:
            EvaluationError: if the model embeds no images, or some embeddings are not finite.
        """
        return self._embed("images", self.image, images)

    def _embed(self, what: str, encode: Callable[[list[Any]], np.ndarray] | None, inputs: Sequence[Any]) -> np.ndarray:
        if isinstance(inputs, str | bytes):
            raise EvaluationError(f"The {what} to embed are a single {type(inputs).__name__}; give a list.")
        items = list(inputs)
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
                f"first number {int(np.argmin(finite))}; check its weights and the dtype it is loaded in."
            )
        return vectors


def require_model(path: str) -> None:
    """Check that a model exists, before any data is read.

    Args:
        path: local folder or Hub id.

    Raises:
        EvaluationError: if the path is neither a folder with a model nor the id of a model on the Hub.
    """
    folder = Path(path).expanduser()
    if folder.is_file():
        raise EvaluationError(f"'{path}' is a file; give the folder of a model.")
    if folder.is_dir():
        if any((folder / name).is_file() for name in ("config.json", "modules.json")):
            return
        inner = next((name for name in ("model", "final") if (folder / name / "config.json").is_file()), None)
        hint = f"; did you mean '{Path(path) / inner}'?" if inner else "."
        raise EvaluationError(f"'{path}' holds no model: there is neither config.json nor modules.json in it{hint}")
    if looks_like_path(path):
        raise EvaluationError(f"There is no model at '{path}'; check the path.")
    try:
        exists = _has(path, "config.json") or _has(path, "modules.json")
        reason = "it has neither config.json nor modules.json"
    except Exception as error:  # no such repository, no connection, an invalid name
        exists, reason = False, first_line(error)
    if not exists:
        raise EvaluationError(f"There is no model folder '{path}' here, and no such model on the Hub ({reason}).")


def load_encoder(path: str, batch_size: int = 64, device: str | None = None) -> Encoder:
    """Load a model of any family.

    Args:
        path: local folder or Hub id.
        batch_size: texts or images per forward pass.
        device: "cpu", "cuda", ... If None, a GPU if there is one.

    Raises:
        EvaluationError: if there is no such model, or it belongs to none of the families.
    """
    require_model(path)
    path = str(Path(path).expanduser()) if path.startswith("~") else path
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        if _has(path, "modules.json") and not _is_bifocal(path):
            return _sentence_transformer(path, batch_size, device)
        config = AutoConfig.from_pretrained(path)
        if config.model_type == "bifocal":
            return _bifocal(path, batch_size, device)
        return _dual_encoder(path, batch_size, device)
    except EvaluationError:
        raise
    except Exception as error:  # configuration, weights, tokenizer: each library has its own errors
        raise EvaluationError(f"The model '{path}' cannot be loaded ({first_line(error)}).") from error


def bifocal_encoder(model: BifocalModel, name: str, batch_size: int = 64) -> Encoder:
    """Return an encoder of a loaded Bifocal model.

    Args:
        model: the model.
        name: name of the model, for tables.
        batch_size: texts or images per forward pass.
    """

    def text(texts: list[str]) -> np.ndarray:
        return np.asarray(model.encode_text(texts, batch_size=batch_size, show_progress=False))

    def image(images: list[Any]) -> np.ndarray:
        return np.asarray(model.encode_image(images, batch_size=batch_size, show_progress=False))

    return Encoder(name, "Bifocal", text, image, sum(p.numel() for p in model.parameters()), batch_size)


def encoder_of(model: Any, processor: Any, name: str, batch_size: int = 64) -> Encoder:
    """Return an encoder of a loaded model: a Bifocal model, or one of transformers with both towers.

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
    return dual_encoder(model, processor, name, batch_size)


def sentence_transformer(path: str, batch_size: int = 64, device: str | None = None) -> Encoder | None:
    """Load a model of any family through sentence-transformers; None if it has no sentence-transformers files.

    Args: see `load_encoder`.
    """
    return _sentence_transformer(path, batch_size, device) if _has(path, "modules.json") else None


def _bifocal(path: str, batch_size: int, device: str) -> Encoder:
    model = BifocalModel.from_pretrained(path).to(device).eval()
    return bifocal_encoder(model, _name(path), batch_size)


def _sentence_transformer(path: str, batch_size: int, device: str | None) -> Encoder:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(path, device=device)

    def encode(items: list[Any]) -> np.ndarray:
        return model.encode(items, batch_size=batch_size, normalize_embeddings=True, convert_to_numpy=True)

    def image(images: list[Any]) -> np.ndarray:
        return encode([load_image(value) for value in images])

    embeds_images = "image" in (getattr(model, "modalities", None) or [])
    count = sum(p.numel() for p in model.parameters())
    return Encoder(_name(path), "sentence-transformers", encode, image if embeds_images else None, count, batch_size)


def _dual_encoder(path: str, batch_size: int, device: str) -> Encoder:
    """Load a model of transformers with `get_text_features` and `get_image_features`: CLIP, SigLIP, ALIGN, ..."""
    model = AutoModel.from_pretrained(path).to(device).eval()
    if not hasattr(model, "get_text_features") or not hasattr(model, "get_image_features"):
        raise EvaluationError(
            f"'{path}' is a {type(model).__name__}, which does not embed texts and images into one space; give a "
            "Bifocal, sentence-transformers, CLIP or SigLIP model."
        )
    processor = AutoProcessor.from_pretrained(path)
    return dual_encoder(model, processor, _name(path), batch_size)


def dual_encoder(model: Any, processor: Any, name: str, batch_size: int = 64) -> Encoder:
    """Return an encoder of a loaded model with `get_text_features` and `get_image_features`.

    Args: see `encoder_of`.
    """
    full_length = padded_length(model.config)
    padding = {"padding": True} if full_length is None else {"padding": "max_length", "max_length": full_length}

    def batches(items: list[Any], embed: Callable[[list[Any]], Any]) -> np.ndarray:
        parts = []
        with torch.inference_mode():
            for start in range(0, len(items), batch_size):
                vectors = embed(items[start : start + batch_size])
                vectors = getattr(vectors, "pooler_output", vectors)
                parts.append(torch.nn.functional.normalize(vectors.float(), dim=-1).cpu().numpy())
        return np.concatenate(parts)

    def text(texts: list[str]) -> np.ndarray:
        def embed(batch: list[str]) -> Any:
            inputs = processor(text=batch, truncation=True, return_tensors="pt", **padding).to(model.device)
            if full_length is not None:
                inputs.pop("attention_mask", None)
            return model.get_text_features(**inputs)

        return batches(texts, embed)

    def image(images: list[Any]) -> np.ndarray:
        def embed(batch: list[Any]) -> Any:
            loaded = [load_image(value) for value in batch]
            return model.get_image_features(**processor(images=loaded, return_tensors="pt").to(model.device))

        return batches(images, embed)

    return Encoder(name, "transformers", text, image, sum(p.numel() for p in model.parameters()), batch_size)


def _is_bifocal(path: str) -> bool:
    try:
        return AutoConfig.from_pretrained(path).model_type == "bifocal"
    except (OSError, ValueError, KeyError):
        return False


def _has(path: str, name: str) -> bool:
    return cached_file(path, name, _raise_exceptions_for_missing_entries=False) is not None


def _name(path: str) -> str:
    """Return the last two parts of a local path, such as `demo/model` for `runs/demo/model`; a Hub id as it is."""
    if Path(path).exists():
        return "/".join(Path(path).absolute().parts[-2:])
    return path
