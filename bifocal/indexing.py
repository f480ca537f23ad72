"""What `bifocal index` reads: the pictures and texts of a folder, file or data set as items of an index."""

import os
from collections.abc import Iterator
from typing import Any

from bifocal.hub.search.items import Item
from bifocal.training.data.faults import Fault
from bifocal.training.data.files import PICTURES
from bifocal.training.data.inspecting import rows_of
from bifocal.training.recipe import RecipeError, Source
from bifocal.training.sources import guess_kind

KINDS = ("image-text", "image-only", "text-pair", "text-only")


def kind_of(source: Source, kind: str | None) -> str:
    """The kind of rows to read, told by their columns if not given.

    Raises:
        RecipeError: a kind that is not indexed, or one that cannot be told.
    """
    if kind is not None:
        if kind not in KINDS:
            raise RecipeError(f"'{kind}' is no kind that can be indexed; it must be one of {', '.join(KINDS)}.")
        return kind
    try:
        found = guess_kind(source)
    except RecipeError:
        if isinstance(source.path, str) and _has_pictures(os.path.expanduser(source.path)):
            return "image-only"
        raise
    return "text-pair" if found == "text-triplet" else found


def _has_pictures(folder: str) -> bool:
    return os.path.isdir(folder) and any(
        name.rpartition(".")[2].lower() in PICTURES for _, _, names in os.walk(folder) for name in names
    )


def items_of(source: Source, kind: str, captions: bool, faults: list[tuple[str, str]]) -> Iterator[Item]:
    """The items of a source: its pictures, each with its caption, or its texts.

    Args:
        captions: captions are items of their own, too.
        faults: receives name and reason of rows that cannot be read.
    """
    for name, row in rows_of(source, kind):
        if isinstance(row, Fault):
            faults.append((name, str(row)))
        elif kind in ("image-text", "image-only"):
            texts = _all(row.get("caption"))
            picture = row["image"]
            named = picture if isinstance(picture, str) else name
            yield Item(named, " · ".join(texts), picture)
            if captions:
                yield from (Item(f"{named}#caption", text) for text in texts)
        else:
            texts = _all(row["positive"] if kind == "text-pair" else row["text"])
            yield from (Item(name, text) for text in texts)


def _all(value: Any) -> list[str]:
    if value is None:
        return []
    return [value] if isinstance(value, str) else list(value)
