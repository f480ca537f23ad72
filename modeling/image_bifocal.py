# Copyright 2026 The Bifocal authors. Licensed under the Apache License, Version 2.0.
"""Converts images of any form (path, URL, data URI, base64, bytes, file object, Pillow, array) to upright 8-bit RGB."""

import base64
import binascii
import io
import os
import re
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

ImageSource = str | os.PathLike | bytes | bytearray | memoryview | Image.Image | np.ndarray | torch.Tensor | Any
_TRANSPARENT_MODES = ("RGBA", "LA", "PA", "RGBa", "La")
_TIMEOUT = 30.0  # seconds for a URL to answer
_SCHEME = re.compile(r"([a-z][a-z0-9+.-]+):", re.IGNORECASE)
_BASE64 = re.compile(r"[A-Za-z0-9+/_-]{40,}={0,2}")
_ORIENTATION = 0x0112  # the EXIF tag
# A Pillow image reads its file and EXIF at first use; two threads must not do that with one image at once, nor read one
# file object at once. File objects of unknown kinds, such as members of an archive, may share a file: one lock for all.
_READING = [threading.Lock() for _ in range(16)]
_STREAMS = [threading.Lock() for _ in range(16)]


def _unlock() -> None:
    """Replace the locks in a forked child: the threads that held them exist only in the parent."""
    for locks in (_READING, _STREAMS):
        locks[:] = [threading.Lock() for _ in locks]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_unlock)


def load_image(source: ImageSource, name: str | None = None) -> Image.Image:
    """Read an image and make it upright 8-bit RGB.

    EXIF rotation is applied, transparency is replaced by white, 16-bit greys are scaled (Pillow would clip them to
    white), palette, grey and CMYK images are converted, and the first frame of an animation is used.

    Args:
        source: a path (`~` is the home folder), an http(s) or file URL, a `data:` URI, a base64 string, the bytes of an
            image file, a file object opened in binary mode, a dict with `bytes` or `path` (as `datasets` stores
            images), a Pillow image, or an array or tensor of shape (height, width), (height, width, channels) or
            (channels, height, width) with 1, 3 or 4 channels: integers of 8 or 16 bits, or floats from 0 to 1.
        name: name of the image in errors; its path or URL when None.

    Raises:
        FileNotFoundError: if the path does not exist.
        ValueError: if the source cannot be read as an image.
    """
    return decode_image(source, name).image


@dataclass(frozen=True)
class DecodedImage:
    """An upright image in 8-bit RGB.

    Args:
        image: the image.
        box: (left, upper, right, lower) of the part that it fills, in fractions of pixels; None if it fills all. A half
            of 749 pixels are 375, and the last one is half empty.
    """

    image: Image.Image
    box: tuple[float, float, float, float] | None = None


def decode_image(source: ImageSource, name: str | None = None, smallest_side: int | None = None) -> DecodedImage:
    """Read an image as `load_image` does, on request at reduced scale.

    Args:
        source, name: as for `load_image`.
        smallest_side: if given, a JPEG file is decoded at a half, a quarter or an eighth of its size as long as its
            shorter side keeps this length.

    Raises:
        FileNotFoundError, ValueError: as for `load_image`.
    """
    if isinstance(source, Mapping) and _is_image_dict(source):
        source = source["path"] if source.get("bytes") is None else source["bytes"]
    with _reading(source):
        if isinstance(source, Image.Image):
            image, name = source, name or "The Pillow image"
        elif hasattr(source, "__array__") and not isinstance(source, str | bytes):  # strings of numpy are both
            image = _from_array(source, name or "The array")
        else:
            name = name or _name(source)
            image = _open(source, name)
        if 0 in image.size:
            raise ValueError(f"{name} has no pixels ({image.width} x {image.height}); replace or remove it.")
        try:
            if image is source:
                return DecodedImage(_to_rgb(image))
            with image:  # an image opened here is closed here: Pillow keeps the file of an animation open
                box = None if smallest_side is None else _reduce(image, smallest_side)
                return DecodedImage(_to_rgb(image), box)
        except Exception as error:  # Pillow raises many kinds here, SyntaxError and struct.error among them
            raise ValueError(f"{name} is a broken image ({error}); replace or remove it.") from error


@contextmanager
def _reading(source: Any) -> Iterator[None]:
    """Hold the locks of a Pillow image or a file object while it is read."""
    is_image = isinstance(source, Image.Image)
    if not is_image and not hasattr(source, "read"):
        yield
        return
    stream = getattr(source, "fp", None) if is_image else source
    with _READING[id(source) // 64 % len(_READING)]:
        if stream is None or getattr(source, "_exclusive_fp", False):  # the image is loaded, or has a file of its own
            yield
            return
        private = type(stream) is io.BytesIO or type(getattr(stream, "raw", None)) is io.FileIO
        with _STREAMS[id(stream) // 64 % len(_STREAMS) if private else 0]:
            yield


def _reduce(image: Image.Image, smallest_side: int) -> tuple[float, float, float, float] | None:
    """Let a JPEG that is not loaded be decoded at reduced scale, and return the part of it that it will fill."""
    if image.format not in ("JPEG", "MPO") or image.mode not in ("RGB", "L"):
        return None
    width, height = image.size
    image.draft(None, (smallest_side, smallest_side))
    scale = round(width / image.width)
    upright = image.getexif().get(_ORIENTATION, 1) == 1
    return (0.0, 0.0, width / scale, height / scale) if scale > 1 and upright else None


def load_images(sources: Sequence[ImageSource]) -> list[Image.Image]:
    """Read images; errors name an image by its path or URL, or else by its position."""
    return [load_image(source, image_name(source, position)) for position, source in enumerate(sources)]


def image_name(source: ImageSource, position: int) -> str | None:
    """Return the name of an image in errors by its position; None if it has a path or URL, which is its name then."""
    return None if isinstance(source, str | os.PathLike) else f"Image {position}"


def list_images(images: Any) -> tuple[list[Any], bool]:
    """Return the images as a flat list, and whether the argument was a single image.

    Several images are a list, tuple, Series, array of paths or any other iterable, also nested as transformers'
    processors take them, or an array or tensor with a leading batch axis.

    Raises:
        ValueError: if the argument is a table or a dict of columns.
    """
    refuse_table(images, "images", ("image", "img", "photo", "picture", "path", "file", "url"))
    if hasattr(images, "__array__") and getattr(images, "ndim", 0) > 1 and not isinstance(images, torch.Tensor):
        images = np.asarray(images)
    single = isinstance(images, str | bytes | bytearray | memoryview | os.PathLike | Image.Image | Mapping)
    if isinstance(images, np.ndarray | torch.Tensor):
        single = not (images.ndim == 4 or (images.ndim > 0 and _holds_objects(images)))
    if single or hasattr(images, "read") or not hasattr(images, "__iter__"):
        return [images.item() if _holds_objects(images) else images], True
    return list(_flat(images)), False


def _flat(images: Any) -> Iterator[Any]:
    for image in images:
        nested = isinstance(image, list | tuple)
        if isinstance(image, np.ndarray | torch.Tensor):
            nested = image.ndim == 4 or (image.ndim > 0 and _holds_objects(image))
        if nested:
            yield from _flat(image)
        else:
            yield image


def _holds_objects(images: Any) -> bool:
    """Return whether an array holds paths, bytes or other objects instead of numbers."""
    return isinstance(images, np.ndarray) and images.dtype.kind in "OUST"


def refuse_table(value: Any, argument: str, likely: Sequence[str]) -> None:
    """Raise an error for a table or a dict of columns, whose iteration gives its column names, and for a set.

    Args:
        value: value of the argument.
        argument: name of the argument.
        likely: parts of column names; the error suggests the first column that contains one.

    Raises:
        ValueError: if the value is a table, a dict of columns or a set.
    """
    if isinstance(value, set | frozenset):
        raise ValueError(f"{argument} is a set, which has no order; give a list.")
    if _is_image_dict(value):
        return
    columns = getattr(value, "column_names", None)
    if columns is None:
        columns = value if isinstance(value, Mapping) else getattr(value, "columns", None)
    if columns is None or isinstance(value, type):
        return
    names = [str(column) for column in columns]
    suggested = next((name for part in likely for name in names if part in name.lower()), None)
    example = "" if suggested is None else f", such as {argument}[{suggested!r}]"
    raise ValueError(
        f"{argument} is a {type(value).__name__} with {', '.join(map(repr, names[:10])) or 'no columns'}; give one "
        f"column{example}."
    )


def _is_image_dict(source: Any) -> bool:
    """Return whether a source has the form in which `datasets` stores an image: its bytes, its path, or both."""
    if not isinstance(source, Mapping) or not {"bytes", "path"}.issuperset(source):
        return False
    return any(isinstance(value, str | os.PathLike | bytes | bytearray | memoryview) for value in source.values())


def _name(source: Any) -> str:
    if isinstance(source, bytes | bytearray | memoryview):
        return "The image given as bytes"
    if not isinstance(source, str | os.PathLike):
        return "The image"
    text = os.fspath(source)
    text = os.fsdecode(text).encode("utf-8", "backslashreplace").decode()
    if text[:5].lower() == "data:" or len(text) > 200:
        return f"Image '{text[:50]}...'"
    if len(text) > 60 and _BASE64.fullmatch(text):
        return f"Image '{text[:40]}...{text[-15:]}'"
    return f"Image '{text}'"


def _open(source: Any, name: str) -> Image.Image:
    content: Any
    if isinstance(source, bytes | bytearray | memoryview):
        content = io.BytesIO(source)
    elif isinstance(source, str | os.PathLike):
        content = _content(os.fsdecode(source), name)
    elif isinstance(source, io.TextIOBase):
        raise ValueError(f"{name} is a file opened as text; open it with mode 'rb'.")
    elif hasattr(source, "read"):
        content = source
    elif isinstance(source, Mapping):
        raise ValueError(
            f"{name} is a dict with {', '.join(map(repr, source)) or 'no keys'}; give the image itself, or "
            "{'bytes': ...} or {'path': ...}."
        )
    else:
        raise ValueError(
            f"{name} is of type {type(source).__name__}; give a path, URL, base64, bytes, file object, Pillow image or "
            "array."
        )
    try:
        return Image.open(content)
    except Image.UnidentifiedImageError as error:
        raise ValueError(f"{name} is not an image of a format Pillow can read; replace or remove it.") from error
    except Exception as error:
        raise ValueError(f"{name} could not be opened ({error}); replace or remove it.") from error


def _content(text: str, name: str) -> str | io.BytesIO:
    """Return the path that a string names, or the bytes that it holds or links to."""
    matched = _SCHEME.match(text)
    scheme = matched[1].lower() if matched else ""
    if scheme == "data":
        return io.BytesIO(_decode_data_uri(text, name))
    if scheme in ("http", "https"):
        return io.BytesIO(_download(text, name))
    path = text
    if not os.path.exists(path):
        if scheme == "file":
            path = urllib.parse.unquote(re.sub("^file:(//(localhost)?(?=/))?", "", text, flags=re.IGNORECASE))
        elif "://" in text and scheme:
            raise ValueError(
                f"{name} cannot be read over {scheme}://; give a path or an http(s) address, or download it first."
            )
        path = os.path.expanduser(path)
    if not os.path.exists(path):
        decoded = _decode_bare_base64(text)
        if decoded is not None:
            return io.BytesIO(decoded)
        if len(text) > 1000:
            raise ValueError(f"{name} is neither a path nor the base64 of an image; encode it again.")
        raise FileNotFoundError(f"{name} does not exist; check the path.")
    if os.path.isdir(path):
        raise ValueError(f"{name} is a folder, not a file; give the images in it one by one.")
    return path


def _download(url: str, name: str) -> bytes:
    request = urllib.request.Request(url, headers={"User-Agent": "bifocal"})
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT) as response:
            return response.read()
    except (OSError, urllib.error.URLError, ValueError) as error:
        raise ValueError(f"{name} could not be downloaded ({error}); check the address.") from error


def _decode_data_uri(uri: str, name: str) -> bytes:
    header, comma, payload = uri.partition(",")
    if not comma:
        raise ValueError(f"{name} is not a data URI; it must look like 'data:image/png;base64,...'.")
    if not header.rstrip().lower().endswith(";base64"):
        return urllib.parse.unquote_to_bytes(payload)
    try:
        return _decode_base64(urllib.parse.unquote(payload))
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"{name} holds broken base64 ({error}); encode it again.") from error


def _decode_base64(text: str) -> bytes:
    """Decode base64 of either alphabet, with line breaks and without padding."""
    text = "".join(text.split()).rstrip("=").translate(str.maketrans("-_", "+/"))
    return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)


def _decode_bare_base64(text: str) -> bytes | None:
    """Return the bytes of a string that is the base64 of an image, or None for any other string."""
    if not _BASE64.fullmatch("".join(text.split())):
        return None
    try:
        decoded = _decode_base64(text)
        Image.open(io.BytesIO(decoded))
    except Exception:
        return None
    return decoded


def _from_array(source: Any, name: str) -> Image.Image:
    if isinstance(source, torch.Tensor):
        source = source.detach().cpu()
        if source.dtype in (torch.bfloat16, torch.float16):
            source = source.float()  # numpy has no bfloat16
        source = source.numpy()
    array = np.asarray(source)
    if array.dtype.name == "bfloat16":
        array = array.astype(np.float32)
    shape = array.shape
    if array.ndim == 3 and array.shape[-1] not in (1, 3, 4) and array.shape[0] in (1, 3, 4):
        array = np.moveaxis(array, 0, -1)
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[-1] not in (3, 4)) or 0 in array.shape:
        raise ValueError(
            f"{name} has shape {tuple(shape)}; an image array is (height, width), (height, width, channels) or "
            "(channels, height, width) with 1, 3 or 4 channels."
        )
    return Image.fromarray(_to_8_bits(array, name))


def _to_8_bits(array: np.ndarray, name: str) -> np.ndarray:
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array)
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * 255
    if array.dtype == np.uint16:
        return np.round(array / 257.0).astype(np.uint8)
    if np.issubdtype(array.dtype, np.floating):
        scaled = np.round(array * 255.0)  # resampling leaves values such as 1.0000001, which round to what is meant
        if not np.isfinite(scaled).all() or scaled.min() < 0.0 or scaled.max() > 255.0:
            raise ValueError(f"{name} holds floats outside 0 to 1; scale them, or give 8-bit integers.")
        return scaled.astype(np.uint8)
    raise ValueError(f"{name} is of dtype {array.dtype}; give uint8, uint16, bool, or floats from 0 to 1.")


def _to_rgb(image: Image.Image) -> Image.Image:
    image.load()  # Pillow reads lazily: a cut or damaged file only shows here
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        image = Image.fromarray(_to_8_bits(np.asarray(image).astype(np.uint16), "The image"))
    elif image.mode in ("I", "F"):  # 32 bits a pixel: 16-bit greys of older Pillow releases, scientific formats
        values = np.asarray(image, dtype=np.float64)
        top = 255.0 if 1.0 < values.max() <= 255.0 else max(1.0, 65535.0 * (values.max() > 255.0))
        image = Image.fromarray((np.clip(values / top, 0.0, 1.0) * 255.0).round().astype(np.uint8))
    if image.mode in _TRANSPARENT_MODES or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")
