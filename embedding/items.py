"""What is embedded: images and texts, with the bytes and thumbnails of images."""

import hashlib
import io
import math
import unicodedata
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
THUMBNAIL_SIZE = 256
_LOSSLESS_SIZE = 64  # thumbnails up to this size are PNG


class ItemError(BifocalError):
    """What is wrong with an image or a text. The message does not name it."""


@dataclass
class Item:
    """An image, with the text that belongs to it if there is one, or a text.

    Args:
        name: where the item comes from: a path, or a file and row.
        text: the text itself, or the text that is shown with an image.
        image: a path, the bytes of a file, or a Pillow image, which has no key; None for a text.
        has_stable_name: whether the name stays with the item, as that of a file does; the number of a row does not.
    """

    name: str
    text: str = ""
    image: str | Path | bytes | Image.Image | None = None
    has_stable_name: bool = False

    @property
    def kind(self) -> str:
        return "text" if self.image is None else "image"

    def key(self) -> str:
        """Return a hash of the content: equal for equal content, whatever it is called.

        Raises:
            ItemError: if an image's file cannot be read.
        """
        if isinstance(self.image, Image.Image):
            raise TypeError("A decoded image has no key.")
        if self.image is None:
            content = unicodedata.normalize("NFC", self.text).strip().encode("utf-8", "surrogatepass")
        elif isinstance(self.image, bytes):
            content = self.image
        else:
            try:
                path = Path(self.image)
                if path.exists() and not path.is_file():  # reading a pipe would wait forever
                    raise ItemError("it is not a file")
                content = path.read_bytes()
            except OSError as error:
                raise ItemError(f"it cannot be read ({error.strerror})") from error
        return hashlib.blake2b(self.kind.encode() + content, digest_size=16).hexdigest()


def require_image(source: Any, max_pixels: int | None = MAX_PIXELS) -> None:
    """Check the header of an image.

    Raises:
        ItemError: if it is not an image, or too large. The message does not name the image.
    """
    size = _image_size(source)
    if max_pixels is not None and size[0] * size[1] > max_pixels:
        raise ItemError(f"it has {size[0]} x {size[1]} pixels, more than {max_pixels:,}")


def image_pixels(source: Any) -> int:
    """Return the number of pixels by an image's header; 0 for what is no image."""
    try:
        return math.prod(_image_size(source))
    except ItemError:
        return 0


def _image_size(source: Any) -> tuple[int, int]:
    """Return the width and height by an image's header.

    Raises:
        ItemError: if it is not an image.
    """
    try:
        if isinstance(source, Image.Image):
            return source.size
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            if image.format == "EPS":  # a program, which Pillow would pass to Ghostscript
                raise ItemError("it is PostScript, not an image")
            return image.size
    except ItemError:
        raise
    except FileNotFoundError as error:
        raise ItemError("it does not exist") from error
    except Exception as error:  # Pillow raises many kinds here
        raise ItemError("it cannot be read as an image") from error


def decode_item(
    source: Any, preparer: "ImagePreparer", smallest_side: int = THUMBNAIL_SIZE, max_pixels: int | None = MAX_PIXELS
) -> "DecodedImage":
    """Return an image as upright RGB, at reduced scale if the preparer does that.

    Args:
        source: a Pillow image, a path or the bytes of a file.
        preparer: decodes the image if it is not too large.
        smallest_side: length that the shorter side keeps in any case.
        max_pixels: largest image that is decoded; None for Pillow's own limit.

    Raises:
        ItemError: if it is too large or cannot be read. The message does not name the image.
    """
    from bifocal.modeling.image_batches_bifocal import NarrowImageError  # with torch

    require_image(source, max_pixels)
    try:
        return preparer.decode(source, smallest_side=smallest_side)
    except NarrowImageError as error:
        raise ItemError("it is too narrow to embed") from error
    except (ValueError, FileNotFoundError) as error:
        raise ItemError("it is broken") from error


def thumbnail(image: Image.Image) -> bytes:
    """Return a small version of an image as the bytes of a PNG or JPEG."""
    small = image.copy()
    small.thumbnail((THUMBNAIL_SIZE, THUMBNAIL_SIZE))
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
