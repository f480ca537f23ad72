"""Any model that embeds texts, pictures or both, behind one face: Bifocal, sentence-transformers, CLIP and SigLIP."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bifocal.errors import EvaluationError, first_line, looks_like_path
from bifocal.modeling import BifocalModel, load_image
from bifocal.modeling.processing_bifocal import padded_length


@dataclass
class Encoder:
    """A model as evaluation sees it.

    Args:
        name: for tables.
        family: "Bifocal", "sentence-transformers" or "transformers".
        text, image: from a list to (number, dimensions) unit vectors in float32; None for what the model cannot embed.
        parameters: how many it has.
        batch_size: texts or images per forward pass.
        done: texts and images embedded so far, and the seconds it took, by "texts" and "pictures".
    """

    name: str
    family: str
    text: Callable[[list[str]], np.ndarray] | None
    image: Callable[[list[Any]], np.ndarray] | None
    parameters: int
    batch_size: int = 64
    done: dict[str, tuple[int, float]] = field(default_factory=dict)

    def speed(self) -> dict[str, float]:
        """Texts and pictures embedded per second since the last call."""
        rates = {f"{what}_per_second": count / max(seconds, 1e-9) for what, (count, seconds) in self.done.items()}
        self.done = {}
        return rates

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """
        Raises:
            EvaluationError: the model embeds no texts, or some embeddings are not finite.
        """
        return self._embedded("texts", self.text, texts)

    def images(self, images: Sequence[Any]) -> np.ndarray:
        """
        Args:
            images: whatever `load_image` reads.

        Raises:
            EvaluationError: the model embeds no pictures, or some embeddings are not finite.
        """
        return self._embedded("pictures", self.image, images)

    def _embedded(
        self, what: str, encode: Callable[[list[Any]], np.ndarray] | None, given: Sequence[Any]
    ) -> np.ndarray:
        if isinstance(given, str | bytes):
            raise EvaluationError(f"The {what} to embed are a single {type(given).__name__}; give a list.")
        items = list(given)
        if encode is None:
            raise EvaluationError(f"'{self.name}' embeds no {what}; leave it out of what needs them.")
        started = time.monotonic()
        vectors = np.asarray(encode(items), dtype=np.float32)
        count, seconds = self.done.get(what, (0, 0.0))
        self.done[what] = (count + len(items), seconds + time.monotonic() - started)
        finite = np.isfinite(vectors).all(axis=1)
        if not finite.all():
            raise EvaluationError(
                f"'{self.name}' gives embeddings that are not finite for {(~finite).sum()} of {len(items)} {what}, "
                f"first number {int(np.argmin(finite))}; look at its weights, and at the dtype it is loaded in."
            )
        return vectors


def require_model(path: str) -> None:
    """Check that there is a model, before any data is read.

    Raises:
        EvaluationError: if the path is neither a folder with a model nor the id of one on the Hub.
    """
    place = Path(path).expanduser()
    if place.is_file():
        raise EvaluationError(f"'{path}' is a file; give the folder of a model.")
    if place.is_dir():
        if any((place / name).is_file() for name in ("config.json", "modules.json")):
            return
        within = next((n for n in ("model", "final") if (place / n / "config.json").is_file()), None)
        hint = f"; did you mean '{Path(path) / within}'?" if within else "."
        raise EvaluationError(f"'{path}' holds no model: there is neither config.json nor modules.json in it{hint}")
    if looks_like_path(path):
        raise EvaluationError(f"There is no model at '{path}'; check the path.")
    try:
        there = _has(path, "config.json") or _has(path, "modules.json")
        reason = "it has neither config.json nor modules.json"
    except Exception as error:  # no such repository, no connection, a name that none can have
        there, reason = False, first_line(error)
    if not there:
        raise EvaluationError(f"There is no model folder '{path}' here, and no such model on the Hub ({reason}).")


def load_encoder(path: str, batch_size: int = 64, device: str | None = None) -> Encoder:
    """A model by its folder or Hub id.

    Args:
        batch_size: texts or pictures embedded at once.
        device: "cpu", "cuda", ...; chosen by what is there when None.

    Raises:
        EvaluationError: there is none, or it is no model of these families.
    """
    import torch
    from transformers import AutoConfig

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
    except Exception as error:  # of configuration, weights, tokenizer: each library has its own
        raise EvaluationError(f"The model '{path}' cannot be loaded ({first_line(error)}).") from error


def bifocal_encoder(model: BifocalModel, name: str, batch_size: int = 64) -> Encoder:
    """A Bifocal model at hand."""

    def text(texts: list[str]) -> np.ndarray:
        return np.asarray(model.encode_text(texts, batch_size=batch_size, show_progress=False))

    def image(images: list[Any]) -> np.ndarray:
        return np.asarray(model.encode_image(images, batch_size=batch_size, show_progress=False))

    return Encoder(name, "Bifocal", text, image, sum(p.numel() for p in model.parameters()), batch_size)


def encoder_of(model: Any, processor: Any, name: str, batch_size: int = 64) -> Encoder:
    """Return an encoder of a loaded model: ours, or one of transformers with both towers.

    Args:
        processor: for a model that has none of its own.

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
    """A model through sentence-transformers, whatever its family; None where it has not the files for that."""
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
        return encode([load_image(one) for one in images])

    sees = bool({"image"} & set(getattr(model, "modalities", []) or []))
    count = sum(p.numel() for p in model.parameters())
    return Encoder(_name(path), "sentence-transformers", encode, image if sees else None, count, batch_size)


def _dual_encoder(path: str, batch_size: int, device: str) -> Encoder:
    """A model of transformers with `get_text_features` and `get_image_features`: CLIP, SigLIP, ALIGN, ..."""
    from transformers import AutoModel, AutoProcessor

    model = AutoModel.from_pretrained(path).to(device).eval()
    if not hasattr(model, "get_text_features") or not hasattr(model, "get_image_features"):
        raise EvaluationError(
            f"'{path}' is a {type(model).__name__}, which embeds no texts and pictures into one space; give a Bifocal, "
            "sentence-transformers, CLIP or SigLIP model."
        )
    processor = AutoProcessor.from_pretrained(path)
    return dual_encoder(model, processor, _name(path), batch_size)


def dual_encoder(model: Any, processor: Any, name: str, batch_size: int = 64) -> Encoder:
    """Return an encoder of a loaded model with `get_text_features` and `get_image_features`, and its processor."""
    import torch

    full_length = padded_length(model.config)
    padding = {"padding": True} if full_length is None else {"padding": "max_length", "max_length": full_length}

    def batches(items: list[Any], embed: Callable[[list[Any]], Any]) -> np.ndarray:
        found = []
        with torch.inference_mode():
            for start in range(0, len(items), batch_size):
                vectors = embed(items[start : start + batch_size])
                vectors = getattr(vectors, "pooler_output", vectors)
                found.append(torch.nn.functional.normalize(vectors.float(), dim=-1).cpu().numpy())
        return np.concatenate(found)

    def text(texts: list[str]) -> np.ndarray:
        def embed(some: list[str]) -> Any:
            inputs = processor(text=some, truncation=True, return_tensors="pt", **padding).to(model.device)
            if full_length is not None:
                inputs.pop("attention_mask", None)
            return model.get_text_features(**inputs)

        return batches(texts, embed)

    def image(images: list[Any]) -> np.ndarray:
        def embed(some: list[Any]) -> Any:
            pictures = [load_image(one) for one in some]
            return model.get_image_features(**processor(images=pictures, return_tensors="pt").to(model.device))

        return batches(images, embed)

    return Encoder(name, "transformers", text, image, sum(p.numel() for p in model.parameters()), batch_size)


def _is_bifocal(path: str) -> bool:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path).model_type == "bifocal"
    except (OSError, ValueError, KeyError):
        return False


def _has(path: str, name: str) -> bool:
    from transformers.utils.hub import cached_file

    return cached_file(path, name, _raise_exceptions_for_missing_entries=False) is not None


def _name(path: str) -> str:
    """The last parts of a path that say what it is: `runs/demo/model` is `demo/model`."""
    if Path(path).exists():
        return "/".join(Path(path).absolute().parts[-2:])
    return path
