"""What is indexed: pictures and texts, each with a name and a key made of its content."""

import hashlib
import io
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bifocal.errors import BifocalError
from bifocal.modeling import load_image

KINDS = ("image", "text")
_SIDE = 256  # of a thumbnail
_SMALL = 64  # pictures up to this side are kept without loss
MAX_PIXELS = 64_000_000  # of a picture; beyond, decoding takes gigabytes


class SearchError(BifocalError):
    """What is wrong with an index or a search, in one sentence."""


@dataclass
class Item:
    """A picture, with the text that belongs to it if there is one, or a text.

    Args:
        name: where it comes from: a path, or a file and row.
        text: of a text, itself; of a picture, what is shown beside it.
        image: a path or the bytes of a file; None for a text.
        own_name: the name stays with the item, as that of a file does; the number of a row does not.
    """

    name: str
    text: str = ""
    image: str | Path | bytes | None = None
    own_name: bool = False

    @property
    def kind(self) -> str:
        return "text" if self.image is None else "image"

    def key(self) -> str:
        """The same for the same content, wherever it comes from.

        Raises:
            SearchError: a picture's file cannot be read.
        """
        if self.image is None:
            content = unicodedata.normalize("NFC", self.text).strip().encode("utf-8", "surrogatepass")
        elif isinstance(self.image, bytes):
            content = self.image
        else:
            try:
                path = Path(self.image)
                if path.exists() and not path.is_file():  # reading a pipe would wait for ever
                    raise SearchError("it is no file")
                content = path.read_bytes()
            except OSError as error:
                raise SearchError(f"it cannot be read ({error.strerror})") from error
        return hashlib.blake2b(self.kind.encode() + content, digest_size=16).hexdigest()


@dataclass
class Hit:
    """One thing found.

    Args:
        score: cosine similarity to the query.
        standing: in a ranking of both kinds, by how many deviations the score is above the mean of its kind.
        thumbnail: bytes of a PNG or JPEG; None for a text.
        names: every name that the content has, this one first.
    """

    name: str
    kind: str
    text: str
    score: float
    standing: float
    thumbnail: bytes | None = None
    names: tuple[str, ...] = ()

    @property
    def other_names(self) -> tuple[str, ...]:
        return tuple(name for name in self.names if name != self.name)

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "name": self.name, "names": [self.name, *self.other_names], "kind": self.kind, "text": self.text,
            "score": self.score, "standing": self.standing,
        }  # fmt: skip


def read_picture(source: Any) -> Image.Image:
    """A picture as upright RGB, if it is not too large to decode.

    Raises:
        SearchError: it is too large, or cannot be read; one sentence without the picture's name.
    """
    try:
        if isinstance(source, Image.Image):
            size = source.size
        else:
            with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as opened:
                size = opened.size
                if opened.format == "EPS":  # a program, which Pillow would hand to Ghostscript
                    raise SearchError("it is PostScript, which is no image")
    except SearchError:
        raise
    except FileNotFoundError as error:
        raise SearchError("it does not exist") from error
    except Exception as error:  # Pillow raises many kinds here
        raise SearchError("it is no picture that can be read") from error
    if size[0] * size[1] > MAX_PIXELS:
        raise SearchError(f"it has {size[0]} x {size[1]} pixels, more than {MAX_PIXELS:,}")
    try:
        return load_image(source)
    except (ValueError, FileNotFoundError) as error:
        raise SearchError("it is broken") from error


def thumbnail(picture: Image.Image) -> bytes:
    small = picture.copy()
    small.thumbnail((_SIDE, _SIDE))
    buffer = io.BytesIO()
    if max(small.size) <= _SMALL:
        small.save(buffer, "PNG")
    else:
        small.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def unit(vectors: np.ndarray) -> np.ndarray:
    """Rows of length 1; a row of zeros stays."""
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / np.maximum(lengths, 1e-12)


def known_kinds(kinds: Sequence[str]) -> tuple[str, ...]:
    unknown = next((kind for kind in kinds if kind not in KINDS), None)
    if unknown is not None or not kinds:
        raise SearchError(f"'{unknown}' is nothing to search for; it must be one of {', '.join(KINDS)}.")
    return tuple(kinds)
