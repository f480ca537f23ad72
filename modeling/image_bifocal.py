# Copyright 2026 The Bifocal authors. Licensed under the Apache License, Version 2.0.
"""From whatever a user holds (path, URL, data URI, bytes, Pillow image, array) to an upright 8-bit RGB picture."""

import base64
import binascii
import io
import os
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

ImageSource = str | Path | bytes | Image.Image | np.ndarray | torch.Tensor
_TRANSPARENT_MODES = ("RGBA", "LA", "PA", "RGBa", "La")
_TIMEOUT = 30.0  # seconds for a URL to answer


def load_image(source: ImageSource, name: str | None = None) -> Image.Image:
    """Read a picture and make it upright 8-bit RGB.

    EXIF rotation is applied, transparency is laid over white, 16-bit greys are scaled (Pillow itself would clip them to
    white), palette, grey and CMYK pictures are converted, and of an animation the first frame is taken.

    Args:
        source: a path, an http(s) URL, a `data:image/...;base64,` URI, the bytes of an image file, a Pillow image, or
            an array or tensor of shape (height, width), (height, width, channels) or (channels, height, width) with 1,
            3 or 4 channels: integers of 8 or 16 bits, or floats from 0 to 1.
        name: what to call the picture in an error; the path or URL when None.

    Raises:
        FileNotFoundError: the path does not exist.
        ValueError: the source cannot be read as a picture.
    """
    if isinstance(source, np.ndarray | torch.Tensor):
        image = _from_array(source, name or "The array")
    elif isinstance(source, Image.Image):
        image, name = source, name or "The Pillow image"
    else:
        name = name or _name(source)
        image = _open(source, name)
    try:
        return _to_rgb(image)
    except Exception as error:  # Pillow raises many kinds here, SyntaxError and struct.error among them
        raise ValueError(f"{name} is a broken image ({error}); replace or remove it.") from error


def _name(source: Any) -> str:
    if isinstance(source, bytes):
        return "The image given as bytes"
    text = str(source)
    return f"Image '{text}'" if len(text) <= 200 else f"Image '{text[:60]}...'"


def _open(source: Any, name: str) -> Image.Image:
    if isinstance(source, bytes):
        content: Any = io.BytesIO(source)
    elif isinstance(source, str) and source.startswith(("http://", "https://")):
        content = io.BytesIO(_download(source, name))
    elif isinstance(source, str) and source.startswith("data:"):
        content = io.BytesIO(_decode_data_uri(source, name))
    elif isinstance(source, str | Path):
        if not os.path.exists(source):
            raise FileNotFoundError(f"{name} does not exist; check the path.")
        if os.path.isdir(source):
            raise ValueError(f"{name} is a folder, not a file; give the pictures in it one by one.")
        content = source
    else:
        raise ValueError(
            f"{name} is of type {type(source).__name__}; give a path, URL, data URI, bytes, Pillow image or array."
        )
    try:
        return Image.open(content)
    except Image.UnidentifiedImageError as error:
        raise ValueError(f"{name} is not an image of a format Pillow can read; replace or remove it.") from error
    except Exception as error:
        raise ValueError(f"{name} could not be opened ({error}); replace or remove it.") from error


def _download(url: str, name: str) -> bytes:
    request = urllib.request.Request(url, headers={"User-Agent": "bifocal"})
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT) as response:
            return response.read()
    except (OSError, urllib.error.URLError, ValueError) as error:
        raise ValueError(f"{name} could not be downloaded ({error}); check the address.") from error


def _decode_data_uri(uri: str, name: str) -> bytes:
    header, comma, payload = uri.partition(",")
    if not comma or not header.endswith(";base64"):
        raise ValueError(f"{name} is no base64 data URI; it must begin like 'data:image/png;base64,'.")
    try:
        return base64.b64decode(payload, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"{name} holds broken base64 ({error}); encode it again.") from error


def _from_array(source: np.ndarray | torch.Tensor, name: str) -> Image.Image:
    array = source.detach().cpu().numpy() if isinstance(source, torch.Tensor) else source
    if array.ndim == 3 and array.shape[-1] not in (1, 3, 4) and array.shape[0] in (1, 3, 4):
        array = np.moveaxis(array, 0, -1)
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[-1] not in (3, 4)) or 0 in array.shape:
        raise ValueError(
            f"{name} has shape {tuple(source.shape)}; an image array is (height, width), (height, width, channels) or "
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
        if not np.isfinite(array).all() or array.min() < 0.0 or array.max() > 1.0:
            raise ValueError(f"{name} holds floats outside 0 to 1; scale them, or give 8-bit integers.")
        return np.round(array * 255.0).astype(np.uint8)
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
