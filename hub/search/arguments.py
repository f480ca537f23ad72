"""Checks what an index or a search is asked for, before a model is loaded. Imports nothing heavy."""

from pathlib import Path
from typing import Any

from bifocal.embedding.items import ItemError, require_image
from bifocal.hub.search.hits import SearchError


def require_model_path(model: str) -> None:
    """Check that a model's local path exists and holds a model. A Hub id passes.

    Raises:
        SearchError: if it does not.
    """
    path = Path(model).expanduser()
    if not path.exists():
        if path.is_absolute() or model.startswith((".", "~")) or model.count("/") != 1:
            raise SearchError(f"There is no model at '{model}' (no such folder). Pass --model with its local path.")
    elif not any((path / file).exists() for file in ("config.json", "modules.json")):
        raise SearchError(
            f"'{model}' holds no model: it has no config.json with a model_type. Give a model's folder or id."
        )


def require_query(text: str | None, image: Any) -> None:
    """Check that there is a text, an image, or both.

    Raises:
        SearchError: if there is neither, or the image cannot be read.
    """
    if not (text or "").strip() and image is None:
        raise SearchError("Enter a text, an image or both.")
    if image is not None:
        try:
            require_image(image)
        except ItemError as error:
            raise SearchError(f"The image cannot be used: {error}. Choose another one.") from error
