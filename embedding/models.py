"""The model that a command embeds with: a dual encoder, or one of sentence-transformers, behind one interface."""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bifocal.errors import ModelError, first_line, model_not_loaded
from bifocal.modeling import BifocalConfig, BifocalModel
from bifocal.modeling.dtype_bifocal import default_device, loading_options, pool_in_float32, resolve_dtype
from bifocal.modeling.image_batches_bifocal import EmbeddedImages, ImagePreparer, embed_ahead
from bifocal.modeling.loading_bifocal import UnsupportedFamilyError, model_kind, read_config, require_vocabulary
from bifocal.modeling.towers_bifocal import pooling_settings, search_prompts

_SENTENCE_FILES = ("sentence_bert_config.json", "config.json")
_PICKLED = "pytorch_model.bin"


class EmbeddingModel:
    """A dual encoder, or a model of sentence-transformers, with one interface.

    Args:
        name: folder or Hub id, for messages.
        model: a `BifocalModel` with its processor, or a `SentenceTransformer`.
        dtype: "model" if its weights have the dtype that they are stored in, else the name of their dtype.
    """

    def __init__(self, name: str, model: Any, dtype: str = "model") -> None:
        self.name, self.model, self.dtype = name, model, dtype
        self.is_joint = hasattr(model, "encode_image")  # also if it is wrapped, by adapters for example
        self.embeds_images: bool = self.is_joint or "image" in model.modalities
        prompts = model.config.prompts if self.is_joint else model.prompts
        self.prompts = search_prompts(prompts)

    @property
    def dimensions(self) -> int:
        """Length of the vectors."""
        return self.model.config.projection_dim if self.is_joint else len(self.encode_text(["a"], "document", "")[0])

    def encode_text(self, texts: Sequence[str], role: str, prompt: str | None, batch_size: int = 32) -> np.ndarray:
        """Return the unit vectors (texts, dimensions) of texts.

        Args:
            texts: the texts.
            role: "query" or "document"; "" for texts that are not part of a search.
            prompt: text that goes before each text; None for the model's own prompt of this role.
            batch_size: texts per forward pass.
        """
        plain = self.model.encode_text if self.is_joint else self.model.encode
        encode = getattr(self.model, f"encode_{role}") if role else plain
        options = {"batch_size": batch_size, "normalize_embeddings": True, "show_progress_bar": False}
        return encode(list(texts), prompt=prompt, **options)

    def encode_image(self, images: Sequence[Any], batch_size: int = 32) -> np.ndarray:
        """Return the unit vectors (images, dimensions) of images that are decoded, or prepared by `image_preparer`.

        Raises:
            ModelError: if the model embeds no images.
        """
        self.require_images()
        encode = self.model.encode_image if self.is_joint else self.model.encode
        return encode(list(images), batch_size=batch_size, normalize_embeddings=True, show_progress_bar=False)

    def image_preparer(self, fast_decoding: bool = False) -> ImagePreparer:
        """Return what decodes images and, for a dual encoder, resizes them.

        Args:
            fast_decoding: decode large JPEGs at reduced scale; see `encode_image` of a model.
        """
        return self.model.image_preparer(fast_decoding) if self.is_joint else ImagePreparer()

    def embed_ahead(
        self, sources: Iterable[Any], read: Callable[[ImagePreparer, Any], tuple[Any, Any]], batch_size: int = 32,
        num_workers: int | None = None, fast_decoding: bool = False,
    ) -> EmbeddedImages:  # fmt: skip
        """Read images in threads ahead of the model, and yield a note and a vector for each, in order.

        Args:
            sources: what is read.
            read: returns a note and the prepared image of a source, or None instead of one that is not embedded.
            batch_size: images per forward pass.
            num_workers: threads that read images; see `encode_image` of a model.
            fast_decoding: see `image_preparer`.

        Raises:
            ModelError: if the model embeds no images.
        """
        preparer = self.image_preparer(fast_decoding)
        embed = partial(self.encode_image, batch_size=batch_size)
        return embed_ahead(sources, partial(read, preparer), embed, preparer, batch_size, num_workers)

    def require_images(self) -> None:
        """Check that the model embeds images.

        Raises:
            ModelError: if it does not.
        """
        if not self.embeds_images:
            raise ModelError(f"'{self.name}' embeds no images; use texts only, or a model that embeds both.")


def load_model(name: str, dtype: str | None = None, device: str | None = None) -> EmbeddingModel:
    """Return a model with its processor. No code of its repository is run.

    A whole dual encoder (Bifocal, CLIP, SigLIP, ...) is a `BifocalModel`, so that all commands get the same vectors of
    it. Other models need the files of sentence-transformers, which say how their tokens become one vector.

    Args:
        name: folder or Hub id.
        dtype: one of `DTYPE_CHOICES`; "model", the dtype of its weights, when None.
        device: "cpu", "cuda", ... If None, a GPU if there is one.

    Raises:
        ModelError: if there is no such model, it cannot be loaded, or it embeds no texts.
        UnsupportedFamilyError: if it is a dual encoder of a family that `BifocalModel` does not know.
    """
    device = device or default_device()
    dtype = resolve_dtype(dtype, device)
    options = loading_options(dtype, device)
    path = model_path(name)
    try:
        if model_kind(path) == "joint":
            joint = BifocalModel.from_pretrained(path, **options).to(device).eval()
            _ = joint.processor  # which may be missing
            return EmbeddingModel(name, joint, dtype)
        from sentence_transformers import SentenceTransformer

        sentences = SentenceTransformer(path, device=device, model_kwargs=options)
        if options:
            pool_in_float32(sentences)
        if "text" not in sentences.modalities:
            raise ValueError("it embeds no texts")
        tokenizer = getattr(sentences, "tokenizer", None)
        if hasattr(tokenizer, "all_special_ids"):
            require_vocabulary(tokenizer, path)
        return EmbeddingModel(name, sentences, dtype)
    except UnsupportedFamilyError:
        raise
    except ImportError as error:
        raise ModelError(f"'{name}' needs a package that is not installed ({first_line(error)}).") from error
    except Exception as error:  # configuration, weights, tokenizer: each library has its own errors
        raise ModelError(model_not_loaded(name, error)) from error


def model_path(name: str | Path) -> str:
    """Return the local path or the whole Hub id that a model's name means, as sentence-transformers reads it."""
    path = str(Path(name).expanduser())
    if Path(path).exists() or "/" in path:
        return path
    return f"sentence-transformers/{name}"


def model_files_state(name: str) -> list[list[Any]]:
    """Return path, bytes and modification time of each file of a local model; nothing for a Hub id."""
    folder = Path(name).expanduser()
    files = sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else []
    return [[str(path.relative_to(folder)), path.stat().st_size, path.stat().st_mtime_ns] for path in files]


def weights_hash(model: str | Path) -> str:
    """Return a short hash of what decides a model's vectors: its weights, and settings that are not its family's.

    Args:
        model: a folder or Hub id.

    Raises:
        ModelError: if there are no weights in safetensors, or some are only in pickle.
    """
    folder = Path(model_path(model))
    if not folder.exists():
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(str(folder), allow_patterns=["*.safetensors", "*.json"]))
        except (OSError, ValueError) as error:
            raise ModelError(f"There is no model at '{model}', here or on the Hub ({first_line(error)}).") from error
    files_of = {inner: _weights_files(folder / inner) for inner in ("", *module_folders(folder))}
    files = [file for of_folder in files_of.values() for file in of_folder]
    if not files or any(not found and (folder / inner / _PICKLED).exists() for inner, found in files_of.items()):
        raise ModelError(
            f"'{model}' has no weights in safetensors, or not all, by which an index knows its model. Load it and save "
            "it with save_pretrained."
        )
    digest = hashlib.blake2b(digest_size=8)
    for path in files:
        with path.open("rb") as file:
            while block := file.read(2**22):
                digest.update(block)
    digest.update(_settings(folder))
    return digest.hexdigest()


def _settings(folder: Path) -> bytes:
    """Return how a model pools and pads where that is not the default of its family, as bytes."""
    if model_kind(str(folder)) == "joint":
        config = read_config(str(folder))
        if not isinstance(config, BifocalConfig):
            return b""
        same = ("text_config", "vision_config", "projection_dim", "text_projection", "vision_projection")
        default = pooling_settings(BifocalConfig(**{name: getattr(config, name) for name in same}))
        changed = {name: value for name, value in pooling_settings(config).items() if value != default[name]}
        return json.dumps(changed, sort_keys=True).encode() if changed else b""
    files = [folder / inner / name for inner in ("", *module_folders(folder)) for name in _SENTENCE_FILES]
    return b"".join(path.read_bytes() for path in files if path.is_file())


def module_folders(folder: Path) -> list[str]:
    """Return the folders within a sentence-transformers model that hold its modules; none for another model."""
    modules = folder / "modules.json"
    if not modules.is_file():
        return []
    paths = [module["path"] for module in json.loads(modules.read_text(encoding="utf-8"))]
    return [path for path in paths if path and ".." not in Path(path).parts and (folder / path).is_dir()]


def _weights_files(folder: Path) -> list[Path]:
    """Return the files of weights that are loaded from a folder, which may hold other ones, too."""
    single = folder / "model.safetensors"
    return [single] if single.exists() else sorted(folder.glob("*.safetensors"))
