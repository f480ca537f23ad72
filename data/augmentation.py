"""Vary training images: random crops, mirror images, colours."""

import math
import random
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageEnhance

_TRIES = 10  # to draw a crop that lies within the image, as torchvision


@dataclass(frozen=True)
class ImageAugmentation:
    """Random changes of training images, with the steps and definitions of torchvision's v2 transforms.

    They are made with Pillow, as torchvision does for Pillow's images, so that a run gives the same on every machine.
    Equal draws of the generator give equal images.

    Args:
        crop_scale: smallest and largest share of the image's area that a crop keeps; None does not crop. CLIP is
            trained with (0.9, 1.0), image classifiers with (0.08, 1.0).
        crop_ratio: smallest and largest width by height of a crop, before it is resized to a square.
        horizontal_flip: probability of the mirror image. Letters and "left" in a caption become wrong in it.
        brightness, contrast, saturation: largest change of a factor: 0.4 draws it from 0.6 to 1.4.
        hue: largest shift of the hue, as a share of the colour circle; at most 0.5.
        color_jitter: probability that brightness, contrast, saturation and hue are changed, in random order.
        grayscale: probability of an image without colours.
        side: width and height of a crop in pixels; set by the trainer.

    Raises:
        ValueError: if a value is out of its range.
    """

    crop_scale: tuple[float, float] | None = None
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    horizontal_flip: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    color_jitter: float = 1.0
    grayscale: float = 0.0
    side: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        for name in ("horizontal_flip", "color_jitter", "grayscale"):
            _require(name, getattr(self, name), 0.0, 1.0)
        for name in ("brightness", "contrast", "saturation"):
            _require(name, getattr(self, name), 0.0, math.inf)
        _require("hue", self.hue, 0.0, 0.5)
        for name, most in (("crop_scale", 1.0), ("crop_ratio", math.inf)):
            pair = getattr(self, name)
            if pair is not None and not (len(pair) == 2 and 0.0 < pair[0] <= pair[1] <= most):
                raise ValueError(f"{name} must be two rising numbers above 0 (at most {most:g}), but it is {pair}.")

    @property
    def smallest_side(self) -> float:
        """Smallest side of a crop as a share of the image's shorter side."""
        if self.crop_scale is None:
            return 1.0
        return math.sqrt(self.crop_scale[0] * min(self.crop_ratio[0], 1.0 / self.crop_ratio[1]))

    def __call__(self, image: Image.Image, generator: random.Random) -> Image.Image:
        """Return a changed copy of an RGB image.

        Args:
            image: the image.
            generator: source of all draws.
        """
        if self.crop_scale is not None:
            box = self._crop(image.size, generator)
            size = self.side or (round(box[2] - box[0]), round(box[3] - box[1]))
            image = image.resize(size, Image.Resampling.BICUBIC, box=box)
        if generator.random() < self.horizontal_flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if generator.random() < self.color_jitter:
            image = self._jittered(image, generator)
        if generator.random() < self.grayscale:
            image = image.convert("L").convert("RGB")
        return image

    def _crop(self, size: tuple[int, int], generator: random.Random) -> tuple[int, int, int, int]:
        """Return left, upper, right and lower edge of a crop."""
        assert self.crop_scale is not None
        width, height = size
        smallest, largest = self.crop_ratio
        for _ in range(_TRIES):
            area = width * height * generator.uniform(*self.crop_scale)
            ratio = math.exp(generator.uniform(math.log(smallest), math.log(largest)))
            across, down = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < across <= width and 0 < down <= height:
                left, top = generator.randint(0, width - across), generator.randint(0, height - down)
                return left, top, left + across, top + down
        # As much of the centre as the ratios allow.
        across = min(width, max(1, round(height * largest)))
        down = min(height, max(1, round(width / smallest)))
        left, top = (width - across) // 2, (height - down) // 2
        return left, top, left + across, top + down

    def _jittered(self, image: Image.Image, generator: random.Random) -> Image.Image:
        enhancers: dict[str, Any] = {
            "brightness": ImageEnhance.Brightness, "contrast": ImageEnhance.Contrast, "saturation": ImageEnhance.Color,
        }  # fmt: skip
        steps = [*enhancers, "hue"]
        generator.shuffle(steps)
        for step in steps:
            strength = getattr(self, step)
            if not strength:
                continue
            if step == "hue":
                image = _with_hue(image, generator.uniform(-strength, strength))
            else:
                factor = generator.uniform(max(0.0, 1.0 - strength), 1.0 + strength)
                image = enhancers[step](image).enhance(factor)
        return image


def _with_hue(image: Image.Image, shift: float) -> Image.Image:
    """Return an image whose hue is shifted by a share of the colour circle."""
    hue, saturation, value = image.convert("HSV").split()
    offset = int(shift * 255)
    return Image.merge("HSV", (hue.point(lambda h: (h + offset) % 256), saturation, value)).convert("RGB")


def _require(name: str, value: float, least: float, most: float) -> None:
    if not least <= value <= most:
        allowed = f"from {least:g} to {most:g}" if most < math.inf else f"at least {least:g}"
        raise ValueError(f"{name} must be {allowed}, but it is {value}.")
