"""A model and an index together: search by text, by picture, or by both."""

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bifocal.hub.search.index import SearchIndex, weights_of
from bifocal.hub.search.items import KINDS, Hit, Item, SearchError, read_picture, unit
from bifocal.hub.search.mirror import Added, Origin
from bifocal.modeling import BifocalModel

LONGEST = 20_000  # characters of a query that are looked at; tokenizing a book takes minutes


class Searcher:
    """Args:
    index: to search.
    model: a folder or Hub id; the one the index was made with when None.

    Raises:
        SearchError: the model cannot be loaded, or has other weights than the index.
    """

    def __init__(self, index: SearchIndex, model: str | None = None) -> None:
        self.index = index
        place = index.model if model is None else os.path.expanduser(model)
        self.model = load_model(place)
        index.require(weights_of(place), place)

    def vector(self, text: str | None = None, picture: Any = None, weight: float = 0.5) -> np.ndarray:
        """The unit vector of a query.

        Args:
            text: of any length; the model sees its beginning.
            picture: anything that `load_image` reads, up to 64 million pixels.
            weight: of the text where both are given, from 0 to 1.

        Raises:
            SearchError: neither is given, or the picture cannot be read.
        """
        text = (text or "").strip()[:LONGEST]
        if not text and picture is None:
            raise SearchError("Give a text, a picture or both.")
        found: list[tuple[float, np.ndarray]] = []
        if picture is not None:
            try:
                decoded = read_picture(picture)
            except SearchError as error:
                raise SearchError(f"The picture cannot be used: {error}. Give another one.") from error
            found.append((1.0 - weight if text else 1.0, self.model.encode_image(decoded)))
        if text:
            found.append((weight if picture is not None else 1.0, self.model.encode_text(text)))
        return unit(np.sum([factor * vector for factor, vector in found], axis=0))

    def search(
        self, text: str | None = None, picture: Any = None, k: int = 10, kinds: Sequence[str] = KINDS,
        weight: float = 0.5, form: tuple[int, str] | None = None,
    ) -> list[Hit]:  # fmt: skip
        """The k nearest items to a text, a picture or both; see `vector` and `SearchIndex.search`."""
        return self.index.search(self.vector(text, picture, weight), k, kinds, form)

    def add(
        self, items: Iterable[Item], batch_size: int = 32, progress: Callable[[int], None] = lambda done: None,
        origin: Origin | None = None, prune: bool = False,
    ) -> Added:  # fmt: skip
        """Embed and add items, see `SearchIndex.add`."""
        return self.index.add(
            items,
            lambda texts: self.model.encode_text(texts, batch_size=batch_size, show_progress=False),
            lambda pictures: self.model.encode_image(pictures, batch_size=batch_size, show_progress=False),
            progress,
            origin,
            prune,
        )


def load_model(place: str) -> BifocalModel:
    """A Bifocal model with its processor; no code of its repository is run.

    Raises:
        SearchError: there is none.
    """
    path = Path(place).expanduser()
    if not path.exists() and (path.is_absolute() or place.startswith((".", "~")) or place.count("/") != 1):
        raise SearchError(f"There is no Bifocal model at '{place}' (no such folder); pass --model with its place.")
    try:
        model = BifocalModel.from_pretrained(path if path.exists() else place).eval()
        _ = model.processor
    except Exception as error:  # transformers, safetensors and tokenizers raise many kinds
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise SearchError(f"There is no Bifocal model at '{place}' ({line}).") from error
    return model
