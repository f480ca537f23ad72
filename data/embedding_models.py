"""Loading the model with which a command embeds: a joint model, or one of sentence-transformers."""

from pathlib import Path
from typing import Any

from bifocal.errors import ModelError, model_not_loaded
from bifocal.modeling import BifocalModel
from bifocal.modeling.dtype_bifocal import default_device, loading_options, pool_in_float32, resolve_dtype
from bifocal.modeling.loading_bifocal import UnsupportedFamilyError, model_kind, require_vocabulary


def load_embedding_model(name: str, device: str | None = None, dtype: str | None = None) -> Any:
    """Return a `BifocalModel` or a `SentenceTransformer`; both have `encode_query` and `encode_document`.

    A whole dual encoder (Bifocal, CLIP, SigLIP, ...) is a `BifocalModel`, so that all commands get the same vectors of
    it. Other models need the files of sentence-transformers, which say how their tokens become one vector.

    Args:
        name: folder or Hub id.
        device: "cpu", "cuda", ... If None, a GPU if there is one.
        dtype: one of `DTYPE_CHOICES`; "model", the dtype of its weights, when None.

    Raises:
        ModelError: if there is no such model, it cannot be loaded, or it embeds no texts.
        UnsupportedFamilyError: if it is a dual encoder of a family that `BifocalModel` does not know.
    """
    device = device or default_device()
    options = loading_options(resolve_dtype(dtype, device), device)
    path = str(Path(name).expanduser()) if name.startswith("~") else name
    if "/" not in path and not Path(path).exists():
        path = f"sentence-transformers/{path}"  # as that library does
    try:
        if model_kind(path) == "joint":
            model = BifocalModel.from_pretrained(path, **options).to(device).eval()
            _ = model.processor  # which may be missing
            return model
        from sentence_transformers import SentenceTransformer

        model = SentenceTransformer(path, device=device, model_kwargs=options)
        if options:
            pool_in_float32(model)
        if "text" not in model.modalities:
            raise ValueError("it embeds no texts")
        tokenizer = getattr(model, "tokenizer", None)
        if hasattr(tokenizer, "all_special_ids"):
            require_vocabulary(tokenizer, path)
        return model
    except UnsupportedFamilyError:
        raise
    except Exception as error:  # configuration, weights, tokenizer: each library has its own errors
        raise ModelError(model_not_loaded(name, error)) from error
