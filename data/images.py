"""Turn the image of a row into pixel values; JPEGs are decoded at reduced scale if the target is small."""

import io
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import interpolate

from bifocal.data.image_errors import image_row_error
from bifocal.data.skips import RowError
from bifocal.modeling import load_image

# A JPEG is decoded at a half, a quarter or an eighth of its size as long as its shorter side stays at least this many
# times that of the target; the rest is resized as always.
_MARGIN = 1.5
_ORIENTATION = 0x0112  # the EXIF tag


@dataclass(frozen=True)
class Cropped:
    """An image that is decoded, resized and cropped: (3, height, width) bytes."""

    pixels: np.ndarray


class ImageReader:
    """Decodes, resizes, crops and normalises as an image processor of transformers does.

    Args:
        processor: an image processor of any family. Only `CLIPImageProcessor` with its usual steps takes the fast way.
        exact: decode at full scale and hand images to the processor, as evaluation does. Otherwise JPEGs are decoded at
            reduced scale: mean pixel differences are below 1 % of the range (0.1 % for images too small to be
            reduced), at a fraction of the time.
        crop: resize and crop when decoding; for images that are not augmented in between.
        smallest_side: side of the smallest part of an image that an augmentation keeps, as a share of the whole.
    """

    def __init__(self, processor: Any, exact: bool = False, crop: bool = True, smallest_side: float = 1.0) -> None:
        self.processor = processor
        self.margin = _MARGIN / smallest_side
        size, cut = (dict(getattr(processor, name, None) or {}) for name in ("size", "crop_size"))
        self.side = size.get("shortest_edge") or 0
        steps = ("do_resize", "do_center_crop", "do_rescale", "do_normalize")
        usual = (
            set(size) == {"shortest_edge"} and cut.get("height") == cut.get("width") == self.side
            and all(getattr(processor, step, False) for step in steps)
        )  # fmt: skip
        self.usual = usual
        self.exact = exact or not usual
        self.crop = crop and not self.exact
        self._table: Any = None if self.exact else _table(processor)

    def decode(self, value: Any, choose: Callable[[Sequence[Any]], Any] | None = None) -> Any:
        """Return an upright RGB image of whatever `load_image` reads or an undecoded `datasets.Image`.

        A decoded image is returned unchanged.

        Args:
            value: an image or a list of them.
            choose: picks the only image of a list that is decoded; when None, all are.

        Raises:
            RowError: if there is no image, or it cannot be read.
        """
        if isinstance(value, RowError):
            raise value
        if isinstance(value, list) and _is_nested(value):
            value = _array(value)
        if isinstance(value, list | tuple):
            if not value:
                raise RowError("no image", "an empty list")
            return [self.decode(item) for item in value] if choose is None else self.decode(choose(value))
        if isinstance(value, Cropped):
            return value
        if isinstance(value, dict) and {"bytes", "path"} & set(value):
            value = _stored(value)
        if value is None or (isinstance(value, str | bytes) and not value):
            raise RowError("no image", f"{value!r}")
        try:
            image = None if self.exact else self._reduced(value)
            if image is None:
                image = load_image(value)
        except Exception as error:
            raise image_row_error(error) from error
        return Cropped(self._cropped(image)) if self.crop else image

    def pixels(self, images: list[Any]) -> torch.Tensor:
        """Return normalised float32 of shape (images, 3, height, width), from what `decode` returns."""
        return self.inputs(images)["pixel_values"]

    def inputs(self, images: list[Any]) -> dict[str, torch.Tensor]:
        """Return the image tower's inputs from what `decode` returns: pixel values and further outputs."""
        if self.exact:
            return self._processed(images)
        pixel_values = np.empty((len(images), 3, self.side, self.side), dtype=np.float32)
        for number, image in enumerate(images):
            array: Any = self._cropped(image)
            for channel in range(3):
                np.take(self._table[channel], array[channel], out=pixel_values[number, channel], mode="clip")
        return {"pixel_values": torch.from_numpy(pixel_values)}

    def _processed(self, images: list[Image.Image]) -> dict[str, torch.Tensor]:
        # Images of the wanted size pass resizing and cropping unchanged; skipping both saves most of the time.
        fits = self.usual and all(image.size == (self.side, self.side) for image in images)
        resize = {"do_resize": False, "do_center_crop": False} if fits else {}
        return dict(self.processor(images, return_tensors="pt", **resize))

    def _reduced(self, value: Any) -> Any:
        """Return a JPEG at the smallest sufficient scale; None for what `load_image` has to read."""
        if isinstance(value, str) and (value.startswith("data:") or "://" in value):
            return None
        if not isinstance(value, bytes | str):
            return None
        if isinstance(value, str) and not os.path.isfile(value):
            return None  # whose message does not repeat what may be a whole image in base64
        image = Image.open(io.BytesIO(value) if isinstance(value, bytes) else value)
        if image.format not in ("JPEG", "MPO") or image.mode not in ("RGB", "L"):
            return load_image(image)
        whole = image.size
        wanted = int(self.margin * self.side)
        image.draft(None, (wanted, wanted))
        scale = round(whole[0] / image.size[0])
        upright = image.getexif().get(_ORIENTATION, 1) == 1
        # What load_image would do to an upright RGB image is to copy it.
        decoded = load_image(image) if image.mode != "RGB" or not upright else image
        decoded.load()
        if scale == 1 or not upright or not self.crop:
            return decoded
        # Half of 749 pixels are 375, and the last is half empty: positions are computed in the original image.
        return self._resized(decoded, whole[0] / scale, whole[1] / scale)

    def _cropped(self, image: Any) -> np.ndarray:
        if isinstance(image, Cropped | np.ndarray):
            return image.pixels if isinstance(image, Cropped) else image
        if image.size == (self.side, self.side):
            return np.asarray(image).transpose(2, 0, 1)
        return self._resized(image, *image.size)

    def _resized(self, image: Image.Image, width: float, height: float) -> np.ndarray:
        """Return an image resized and centre-cropped as the processor does, as (3, height, width) bytes.

        Args:
            width, height: size of the image without the pixels that reduction has added at its right and lower edges.
        """
        side = self.side
        longer = int(side * max(width, height) / min(width, height))
        wide, high = (side, longer) if width <= height else (longer, side)
        left, top = (wide - side) // 2, (high - side) // 2
        if self.processor.resample == Image.Resampling.BICUBIC:
            # torch's resize of bytes gives what Pillow's does, to one step of rounding, in a third of the time.
            pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
            if (width, height) == image.size:
                scaled = interpolate(pixels, (high, wide), mode="bicubic", antialias=True)
            else:
                factors = (high / height, wide / width)
                scaled = interpolate(pixels, scale_factor=factors, mode="bicubic", antialias=True)
            kept = scaled[0, :, top : top + side, left : left + side]
            if kept.shape[1:] == (side, side):
                return kept.contiguous().numpy()
        across, down = width / wide, height / high
        box = (left * across, top * down, (left + side) * across, (top + side) * down)
        small = image.resize((side, side), Image.Resampling(int(self.processor.resample)), box=box)
        return np.asarray(small).transpose(2, 0, 1)


def output_size(processor: Any) -> tuple[int, int]:
    """Return width and height of the images that an image processor gives, in pixels.

    A configuration may name another size: DINOv2's says 518, but its processor crops to 224.
    """
    pixels = processor(Image.new("RGB", (64, 64)), return_tensors="np")["pixel_values"]
    return pixels[0].shape[-1], pixels[0].shape[-2]


def _is_nested(value: list[Any]) -> bool:
    """Return whether a list is one image as nested lists, as `datasets` returns it, and not several images."""
    return bool(value) and isinstance(value[0], list) and bool(value[0]) and isinstance(value[0][0], list | int | float)


def _array(value: list[Any]) -> np.ndarray:
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise RowError("broken image", "nested lists of different lengths") from error
    return array.astype(np.uint8) if array.dtype == np.int64 and 0 <= array.min() <= array.max() < 256 else array


def _stored(value: dict[str, Any]) -> Any:
    """Return what an undecoded `datasets.Image` holds; addresses in archives or hubs are read by `datasets`."""
    content, path = value.get("bytes"), value.get("path")
    if content is None and isinstance(path, str) and "://" in path and not path.startswith(("http://", "https://")):
        import datasets

        try:
            return datasets.Image().decode_example({"bytes": None, "path": path})
        except Exception as error:  # each protocol has its own
            raise image_row_error(error) from error
    return path if content is None else content


def _table(processor: Any) -> np.ndarray:
    """Return (3, 256) normalised values of each byte and channel, computed by the processor and so equal to the bit."""
    values = np.repeat(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), 3, axis=2)
    processed = processor(Image.fromarray(values), do_resize=False, do_center_crop=False, return_tensors="np")
    return np.ascontiguousarray(np.asarray(processed["pixel_values"][0]).reshape(3, 256))
