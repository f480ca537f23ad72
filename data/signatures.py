"""What is compared of images (difference hash and colours) and texts (MinHash) to find near-duplicates."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from bifocal.data.filters import comparable_text, read_image_bytes
from bifocal.data.image_errors import image_row_error
from bifocal.errors import DataError

TEXT_COLUMNS = ("caption", "query", "positive", "text", "first", "second")
PERMUTATIONS = 128
HASH_BYTES, COLOURS = 8, 192

_GRID = 8  # colours are means of 8 x 8 fields
_PLAIN = 2.0  # standard deviation of the grey values below which an image has nothing to compare
_HASHED_SIDE = 64  # pixels to which an image is reduced before it is hashed
_NGRAM = 5  # characters


class SignedImage(NamedTuple):
    """What is compared of an image.

    Args:
        digest: digest of its bytes.
        hash: difference hash, 8 bytes.
        colours: mean colours of its fields, 192 bytes.
        plain: whether it is of one colour.
    """

    digest: bytes
    hash: np.ndarray
    colours: np.ndarray
    plain: bool


@dataclass
class Signatures:
    """What is compared of rows: 200 bytes for each image and 512 for each text.

    Args:
        names: names of the rows.
        hashes: difference hashes of the images, of shape (rows, 8); None if the rows have no images.
        colours: mean colours of the fields of each image, of shape (rows, 192).
        plain: whether an image is of one colour, and so is no near-duplicate of another.
        texts: MinHash values by column, of shape (rows, 128).
    """

    names: list[str] = field(default_factory=list)
    hashes: np.ndarray | None = None
    colours: np.ndarray | None = None
    plain: np.ndarray | None = None
    texts: dict[str, np.ndarray] = field(default_factory=dict)

    @classmethod
    def of_images(cls, names: list[str], signed: Sequence[SignedImage]) -> "Signatures":
        """Return the signatures of images, each as returned by `sign_image`."""
        if not signed:
            return cls(names)
        _, hashes, colours, plain = zip(*signed, strict=True)
        return cls(names, np.stack(hashes), np.stack(colours), np.array(plain))


def sign_rows(rows: Iterable[tuple[str, dict[str, Any]]], images: bool = True, texts: bool = True) -> Signatures:
    """Return the signatures of good rows, in their order.

    Args:
        rows: names and rows, whose images are bytes, paths, or signed ones.
        images, texts: whether to sign the images and the texts.

    Raises:
        DataError: if ImageHash or datasketch is not installed.
        RowError: if an image cannot be read.
    """
    names: list[str] = []
    signed: list[SignedImage] = []
    written: dict[str, list[str]] = {}
    for name, row in rows:
        names.append(name)
        if images and "image" in row:
            signed.append(sign_image(row["image"]))
        if texts:
            for column in TEXT_COLUMNS:
                if column in row:
                    written.setdefault(column, []).append(comparable_text(row[column]))
    signatures = Signatures.of_images(names, signed)
    signatures.texts = {column: sign_texts(values) for column, values in written.items()}
    return signatures


def sign_image(value: Any) -> SignedImage:
    """Return what is compared of an image.

    Args:
        value: bytes, a path, or an image that is signed already.

    Raises:
        DataError: if ImageHash is not installed.
        RowError: if the image cannot be read.
    """
    from bifocal.modeling.image_bifocal import decode_image

    if isinstance(value, SignedImage):
        return value
    try:
        import imagehash
    except ImportError as error:
        raise not_installed("images", "ImageHash") from error
    data = read_image_bytes(value)
    try:
        image = decode_image(data, smallest_side=2 * _HASHED_SIDE).image
    except Exception as error:
        raise image_row_error(error) from error
    image = image.resize((_HASHED_SIDE, _HASHED_SIDE), Image.Resampling.BOX, reducing_gap=2.0)
    colours = np.asarray(image.resize((_GRID, _GRID), Image.Resampling.BOX)).reshape(-1)
    bits = imagehash.dhash(image).hash.reshape(-1)
    plain = bool(np.asarray(image.convert("L")).std() < _PLAIN)
    return SignedImage(digest_of(data), np.packbits(bits), colours, plain)


def digest_of(content: bytes) -> bytes:
    """Return 16 bytes that only equal contents share."""
    return hashlib.blake2b(content, digest_size=16).digest()


def sign_texts(texts: Sequence[str]) -> np.ndarray:
    """Return MinHash values of the character 5-grams of texts, of shape (texts, 128).

    Raises:
        DataError: if datasketch is not installed.
    """
    try:
        from datasketch import MinHash
    except ImportError as error:
        raise not_installed("texts", "datasketch") from error
    ngrams = ([ngram.encode("utf-8", "surrogatepass") for ngram in character_ngrams(text)] for text in texts)
    values = [minhash.hashvalues for minhash in MinHash.generator(ngrams, num_perm=PERMUTATIONS)]
    return np.stack(values).astype(np.uint32) if values else np.empty((0, PERMUTATIONS), np.uint32)


def character_ngrams(text: str) -> set[str]:
    """Return the character 5-grams of a text; the text itself if it is shorter."""
    return {text[start : start + _NGRAM] for start in range(max(1, len(text) - _NGRAM + 1))}


def not_installed(what: str, package: str) -> DataError:
    """Return the error for near-duplicates of images or texts that need a package."""
    return DataError(f"Near-duplicate {what} need {package}. Install it with `pip install {package}`.")
