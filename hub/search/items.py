"""What is indexed, images and texts, and what a search returns."""

import hashlib
import io
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from bifocal.errors import BifocalError

if TYPE_CHECKING:  # they import torch
    from bifocal.modeling.image_batches_bifocal import ImagePreparer
    from bifocal.modeling.image_bifocal import DecodedImage

KINDS = ("image", "text")
MAX_PIXELS = 64_000_000  # of an image; decoding a larger one takes gigabytes
_THUMBNAIL_SIZE = 256
_LOSSLESS_SIZE = 64  # thumbnails up to this size are PNG


class SearchError(BifocalError):
    """What is wrong with an index or a search."""


class QueryError(SearchError):
    """What is wrong with a query. Unlike other errors, it may be shown to a visitor."""


@dataclass
class Item:
    """An image, with the text that belongs to it if there is one, or a text.

    Args:
        name: where the item comes from: a path, or a file and row.
        text: the text itself, or the text that is shown with an image.
        image: a path or the bytes of a file; None for a text.
        has_stable_name: whether the name stays with the item, as that of a file does; the number of a row does not.
    """

    name: str
    text: str = ""
    image: str | Path | bytes | None = None
    has_stable_name: bool = False

    @property
    def kind(self) -> str:
        return "text" if self.image is None else "image"

    def key(self) -> str:
        """Return a hash of the content: equal for equal content, whatever it is called.

        Raises:
            SearchError: if an image's file cannot be read.
        """
        if self.image is None:
            content = unicodedata.normalize("NFC", self.text).strip().encode("utf-8", "surrogatepass")
        elif isinstance(self.image, bytes):
            content = self.image
        else:
            try:
                path = Path(self.image)
                if path.exists() and not path.is_file():  # reading a pipe would wait forever
                    raise SearchError("it is not a file")
                content = path.read_bytes()
            except OSError as error:
                raise SearchError(f"it cannot be read ({error.strerror})") from error
        return hashlib.blake2b(self.kind.encode() + content, digest_size=16).hexdigest()


@dataclass
class Hit:
    """A result of a search.

    Args:
        name: first name of the content.
        kind: "image" or "text".
        text: the text itself, or the captions of an image.
        score: cosine similarity to the query: of the image itself or of the caption that matched.
        ranking_score: what hits are ranked by: the score, or in one ranking of both kinds its distance from the mean
            score of the kind, in standard deviations. For a caption in a ranking of images only, the score of an image
            that is as far from the mean.
        thumbnail: bytes of a PNG or JPEG; None for a text.
        names: all names of the content.
        caption: the caption by which an image was found; None if the image itself matched best, and for a text.
    """

    name: str
    kind: str
    text: str
    score: float
    ranking_score: float
    thumbnail: bytes | None = None
    names: tuple[str, ...] = ()
    caption: str | None = None

    @property
    def matched(self) -> str:
        """What matched best: "image", "caption" or "text"."""
        return self.kind if self.caption is None else "caption"

    @property
    def other_names(self) -> tuple[str, ...]:
        return tuple(name for name in self.names if name != self.name)

    def to_dict(self) -> dict[str, Any]:
        """Return the hit as plain JSON values, without the thumbnail."""
        return {
            "name": self.name, "names": [self.name, *self.other_names], "kind": self.kind, "text": self.text,
            "score": self.score, "ranking_score": self.ranking_score, "matched": self.matched, "caption": self.caption,
        }  # fmt: skip


def require_image(source: Any) -> None:
    """Check the header of an image.

    Raises:
        SearchError: if it is not an image, or too large. The message does not name the image.
    """
    try:
        if isinstance(source, Image.Image):
            size = source.size
        else:
            with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
                size = image.size
                if image.format == "EPS":  # a program, which Pillow would pass to Ghostscript
                    raise SearchError("it is PostScript, not an image")
    except SearchError:
        raise
    except FileNotFoundError as error:
        raise SearchError("it does not exist") from error
    except Exception as error:  # Pillow raises many kinds here
        raise SearchError("it cannot be read as an image") from error
    if size[0] * size[1] > MAX_PIXELS:
        raise SearchError(f"it has {size[0]} x {size[1]} pixels, more than {MAX_PIXELS:,}")


def decode_item(source: Any, preparer: "ImagePreparer") -> "DecodedImage":
    """Return an image as upright RGB, at reduced scale if the preparer does that and a thumbnail needs no more.

    Args:
        source: a Pillow image, a path or the bytes of a file.
        preparer: decodes the image if it is not too large.

    Raises:
        SearchError: if it is too large or cannot be read. The message does not name the image.
    """
    from bifocal.modeling.image_batches_bifocal import NarrowImageError  # with torch

    require_image(source)
    try:
        return preparer.decode(source, smallest_side=_THUMBNAIL_SIZE)
    except NarrowImageError as error:
        raise SearchError("it is too narrow to embed") from error
    except (ValueError, FileNotFoundError) as error:
        raise SearchError("it is broken") from error


def thumbnail(image: Image.Image) -> bytes:
    """Return a small version of an image as the bytes of a PNG or JPEG."""
    small = image.copy()
    small.thumbnail((_THUMBNAIL_SIZE, _THUMBNAIL_SIZE))
    buffer = io.BytesIO()
    if max(small.size) <= _LOSSLESS_SIZE:
        small.save(buffer, "PNG")
    else:
        small.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def normalize(vectors: np.ndarray) -> np.ndarray:
    """Return vectors (..., dimensions) scaled to length 1; vectors of zeros stay."""
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / np.maximum(lengths, 1e-12)


def check_kinds(kinds: Sequence[str]) -> tuple[str, ...]:
    """Return the kinds to search for.

    Raises:
        SearchError: if there are none, or one is unknown.
    """
    unknown = next((kind for kind in kinds if kind not in KINDS), None)
    if unknown is not None or not kinds:
        raise SearchError(f"'{unknown}' cannot be searched for. Choose one of {', '.join(KINDS)}.")
    return tuple(kinds)
