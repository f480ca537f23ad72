"""From what a row holds of a picture to pixel values; JPEGs decoded at reduced scale where the target is small."""

import io
import re
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch.nn.functional import interpolate

from bifocal.modeling import load_image
from bifocal.training.data.faults import Fault

# A JPEG is decoded at a half, a quarter or an eighth of its size as long as its shorter side stays at least so many
# times that of the target; the rest is resized as always.
_MARGIN = 1.5
_ADDRESS = re.compile(r"<_io\.BytesIO object at 0x[0-9a-f]+>")  # in messages of Pillow; another one in each run
_ORIENTATION = 0x0112  # the EXIF tag


class PictureReader:
    """Decodes, resizes, crops and normalises as a `CLIPImageProcessor` does.

    Args:
        processor: a `CLIPImageProcessor`.
        exact: decode pictures whole and hand them to the processor, as evaluation does. Otherwise JPEGs are decoded at
            reduced scale: mean pixel differences are below 1 % of the range (0.1 % for pictures too small to be
            reduced), at a fraction of the time.
        crop: resize and crop when decoding, not later; for pictures that nothing is done to in between. They are then
            arrays of shape (3, height, width) of bytes.
    """

    def __init__(self, processor: Any, exact: bool = False, crop: bool = True) -> None:
        self.processor = processor
        size, cut = dict(processor.size), dict(processor.crop_size)
        self.side = size.get("shortest_edge") or 0
        usual = (
            set(size) == {"shortest_edge"} and cut.get("height") == cut.get("width") == self.side
            and processor.do_resize and processor.do_center_crop and processor.do_rescale and processor.do_normalize
        )  # fmt: skip
        self.exact = exact or not usual
        self.crop = crop and not self.exact
        self._table: Any = None if self.exact else _table(processor)

    def decode(self, value: Any) -> Any:
        """An upright RGB picture from bytes, a path, an undecoded `datasets.Image` or a Pillow picture; of a list each.

        What was decoded before is returned as it is.

        Raises:
            Fault: it cannot be read, and why.
        """
        if isinstance(value, list):
            return [self.decode(one) for one in value]
        if isinstance(value, np.ndarray):
            return value
        if isinstance(value, dict):
            value = value["bytes"] if value["bytes"] is not None else value["path"]
        try:
            picture = None if self.exact else self._reduced(value)
            if picture is None:
                picture = load_image(value)
        except Exception as error:
            raise fault_of(error) from error
        return self._cropped(picture) if self.crop else picture

    def pixels(self, pictures: list[Any]) -> torch.Tensor:
        """(pictures, 3, height, width) normalised float32, of what `decode` returns."""
        if self.exact:
            return self._processed(pictures)
        found = np.empty((len(pictures), 3, self.side, self.side), dtype=np.float32)
        for place, picture in enumerate(pictures):
            array: Any = self._cropped(picture)
            for channel in range(3):
                np.take(self._table[channel], array[channel], out=found[place, channel], mode="clip")
        return torch.from_numpy(found)

    def _processed(self, pictures: list[Image.Image]) -> torch.Tensor:
        crop = self.processor.crop_size
        # Pictures of the wanted size pass resizing and cropping unchanged; leaving both out saves most of the time.
        fits = all(picture.size == (crop["width"], crop["height"]) for picture in pictures)
        resize = {"do_resize": False, "do_center_crop": False} if fits else {}
        return self.processor(pictures, return_tensors="pt", **resize)["pixel_values"]

    def _reduced(self, value: Any) -> Any:
        """A JPEG at the smallest scale that serves; None where the general way is to be taken."""
        if isinstance(value, str) and (value.startswith("data:") or "://" in value):
            return None
        if not isinstance(value, bytes | str):
            return None
        image = Image.open(io.BytesIO(value) if isinstance(value, bytes) else value)
        if image.format not in ("JPEG", "MPO") or image.mode not in ("RGB", "L"):
            return load_image(image)
        whole = image.size
        wanted = int(_MARGIN * self.side)
        image.draft(None, (wanted, wanted))
        scale = round(whole[0] / image.size[0])
        upright = image.getexif().get(_ORIENTATION, 1) == 1
        # What load_image would do to an upright RGB picture is to copy it.
        picture = load_image(image) if image.mode != "RGB" or not upright else image
        picture.load()
        if scale == 1 or not upright or not self.crop:
            return picture
        # Half of 749 pixels are 375, of which the last is half empty: places are found in the whole picture.
        return self._resized(picture, whole[0] / scale, whole[1] / scale)

    def _cropped(self, picture: Any) -> np.ndarray:
        if isinstance(picture, np.ndarray):
            return picture
        if picture.size == (self.side, self.side):
            return np.asarray(picture).transpose(2, 0, 1)
        return self._resized(picture, *picture.size)

    def _resized(self, picture: Image.Image, width: float, height: float) -> np.ndarray:
        """The processor's resize of the shorter side and its centre crop, as (3, height, width) bytes.

        Args:
            width, height: of the picture without what reduction has added at its right and lower edges.
        """
        side = self.side
        longer = int(side * max(width, height) / min(width, height))
        wide, high = (side, longer) if width <= height else (longer, side)
        left, top = (wide - side) // 2, (high - side) // 2
        if self.processor.resample == Image.Resampling.BICUBIC:
            # torch's resize of bytes gives what Pillow's does, to one step of rounding, in a third of the time.
            pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None]
            if (width, height) == picture.size:
                scaled = interpolate(pixels, (high, wide), mode="bicubic", antialias=True)
            else:
                factors = (high / height, wide / width)
                scaled = interpolate(pixels, scale_factor=factors, mode="bicubic", antialias=True)
            kept = scaled[0, :, top : top + side, left : left + side]
            if kept.shape[1:] == (side, side):
                return kept.contiguous().numpy()
        across, down = width / wide, height / high
        box = (left * across, top * down, (left + side) * across, (top + side) * down)
        small = picture.resize((side, side), Image.Resampling(int(self.processor.resample)), box=box)
        return np.asarray(small).transpose(2, 0, 1)


def _table(processor: Any) -> np.ndarray:
    """(3, 256) what each value of each channel becomes: asked of the processor, so that it is the same to the bit."""
    values = np.repeat(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), 3, axis=2)
    found = processor(Image.fromarray(values), do_resize=False, do_center_crop=False, return_tensors="np")
    return np.ascontiguousarray(np.asarray(found["pixel_values"][0]).reshape(3, 256))


def fault_of(error: BaseException) -> Fault:
    """The fault of a row whose picture could not be read."""
    said = _ADDRESS.sub("the bytes", str(error).removesuffix("; replace or remove it."))
    return Fault(_cause(error), said[:300])


def _cause(error: BaseException) -> str:
    inner: BaseException | None = error
    while inner is not None:
        if isinstance(inner, FileNotFoundError):
            return "missing picture"
        if isinstance(inner, UnidentifiedImageError):
            return "not a picture"
        if isinstance(inner, Image.DecompressionBombError | Image.DecompressionBombWarning):
            return "decompression bomb"
        inner = inner.__cause__
    return "broken picture"
