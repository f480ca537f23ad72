"""Which texts of an index are captions of its images: an image and its captions are one item.

The table itself says so: a caption has the name of its image with `#caption` after it, in the same source, and the
image shows the caption as its text. A text that only has such a name stays a text.
"""

import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bifocal.hub.search.table import CAPTION_SEPARATOR, Occurrence, join_captions

_SUFFIX = "#caption"


def caption_name(image: str) -> str:
    """Return the name of an image's captions."""
    return image + _SUFFIX


def _has_caption(captions: str, text: str) -> bool:
    """Return whether a text is one of an image's captions.

    Args:
        captions: all of them, joined.
        text: equal to the caption except for spaces around it and the form of its Unicode, as equal keys are.
    """
    return join_captions(["", _plain(text), ""]) in join_captions(["", _plain(captions), ""])


def _plain(text: str) -> str:
    return join_captions(part.strip() for part in unicodedata.normalize("NFC", text).split(CAPTION_SEPARATOR))


@dataclass
class Captions:
    """The captions of a table.

    Args:
        images: rows of the images that each caption belongs to, by row of the caption.
        is_caption: for each row, whether it is a caption.
        is_text: for each row, whether it is a text that does not only occur as a caption.
        text_names: names of texts that occur as captions, too, without the names of the captions, by row.
    """

    images: Mapping[int, tuple[int, ...]]
    is_caption: np.ndarray
    is_text: np.ndarray
    text_names: Mapping[int, tuple[str, ...]] = field(default_factory=dict)


def find_captions(rows: Any) -> Captions:
    """Return the captions of a table.

    Args:
        rows: Arrow table with the columns of `Table`.
    """
    places = _Places(rows)
    images: dict[int, set[int]] = defaultdict(set)
    linked: set[int] = set()
    for caption, image in places.pairs():
        images[int(places.rows[caption])].add(int(places.rows[image]))
        linked.add(caption)
    is_caption = np.zeros(len(rows), bool)
    is_caption[list(images)] = True
    is_free = ~places.is_image
    is_free[list(linked)] = False
    is_text = np.zeros(len(rows), bool)
    is_text[places.rows[is_free]] = True
    text_names: dict[int, dict[str, None]] = defaultdict(dict)
    for place in np.flatnonzero(is_free & is_caption[places.rows]).tolist():
        text_names[int(places.rows[place])][places.names[place].as_py()] = None
    return Captions(
        {row: tuple(sorted(of_row)) for row, of_row in images.items()}, is_caption, is_text,
        {row: tuple(names) for row, names in text_names.items()},
    )  # fmt: skip


def captions_to_remove(rows: Any, is_removed: Callable[[str, Occurrence], bool]) -> set[tuple[str, int, str]]:
    """Return key, source and name of the captions whose images are all removed.

    Args:
        rows: Arrow table with the columns of `Table`.
        is_removed: whether an image, by its key, is removed from a place where it occurs.
    """
    places = _Places(rows)
    stays: dict[int, bool] = {}
    for caption, image in places.pairs():
        stays[caption] = stays.get(caption, False) or not is_removed(*places.occurrence(image))
    removed = (places.occurrence(caption) for caption, image_stays in stays.items() if not image_stays)
    return {(key, occurrence.source, occurrence.name) for key, occurrence in removed}


class _Places:
    """All occurrences of a table's rows, one after the other.

    Args:
        table: Arrow table with the columns of `Table`.
    """

    def __init__(self, table: Any) -> None:
        import pyarrow as pa
        import pyarrow.compute as pc

        self.table = table
        column = table.column("occurrences").combine_chunks()
        flat = column.flatten()
        self.rows: np.ndarray = pc.list_parent_indices(column).to_numpy()
        self.sources, self.names, self.texts = (pc.struct_field(flat, name) for name in Occurrence._fields)
        of_images = pc.equal(table.column("kind"), pa.scalar("image")).to_numpy()
        self.is_image: np.ndarray = of_images[self.rows]

    def occurrence(self, place: int) -> tuple[str, Occurrence]:
        """Return the key of the row and its occurrence at a place."""
        values = (column[place].as_py() for column in (self.sources, self.names, self.texts))
        return self.table.column("key")[int(self.rows[place])].as_py(), Occurrence(*values)

    def pairs(self) -> Iterator[tuple[int, int]]:
        """Yield the place of each caption with that of each image that it belongs to."""
        import pyarrow.compute as pc

        has_suffix = pc.ends_with(self.names, _SUFFIX).to_numpy(zero_copy_only=False)
        places = np.flatnonzero(has_suffix & ~self.is_image)
        if not len(places):
            return
        captions: dict[tuple[int, str], list[tuple[int, str]]] = defaultdict(list)
        texts = self.table.column("text").take(self.rows[places]).to_pylist()
        for place, text, source, name in zip(
            places.tolist(), texts, self.sources.take(places).to_pylist(), self.names.take(places).to_pylist(),
            strict=True,
        ):  # fmt: skip
            if text.strip():  # earlier versions indexed empty ones
                captions[source, name.removesuffix(_SUFFIX)].append((place, text))
        images = np.flatnonzero(self.is_image)
        columns = (column.take(images).to_pylist() for column in (self.sources, self.names, self.texts))
        for image, source, name, of_image in zip(images.tolist(), *columns, strict=True):
            for place, text in captions.get((source, name), ()):
                if text == of_image or _has_caption(of_image, text):
                    yield place, image


def count_in_words(counts: Mapping[str, int]) -> str:
    """Return the counts of an index in words: "4 images with 9 captions and 2 texts"."""
    captions = f" with {counts['caption']:,} captions" if counts.get("caption") else ""
    return f"{counts['image']:,} images{captions} and {counts['text']:,} texts"
