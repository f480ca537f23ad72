"""Images decoded at reduced scale look like those decoded whole."""

import io
from functools import cache

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.clip import CLIPImageProcessorPil

from bifocal.data.images import ImageReader
from bifocal.modeling import load_image
from bifocal.modeling.processing_bifocal import image_processor_of_size


@pytest.fixture(scope="module")
def clip() -> CLIPImageProcessorPil:
    return image_processor_of_size(224)


@cache
def pixels(width: int, height: int) -> np.ndarray:
    """Noise at all scales, falling with the frequency as in photos, and edges."""
    draw = np.random.default_rng(width)
    across, down = np.fft.rfftfreq(width)[None], np.fft.fftfreq(height)[:, None]
    radius = np.maximum(np.hypot(across, down), 1 / width)
    planes = []
    for _ in range(3):
        spectrum = np.fft.rfft2(draw.standard_normal((height, width))) / radius
        plane = np.fft.irfft2(spectrum, s=(height, width))
        planes.append(128 + 45 * (plane - plane.mean()) / plane.std())
    image = np.stack(planes, axis=-1)
    image[height // 4 : height // 2, width // 3 : width // 2] = (250, 20, 60)
    return image.clip(0, 255).astype(np.uint8)


def photo(width: int, height: int, mode: str = "RGB", form: str = "JPEG", **options) -> bytes:
    image = Image.fromarray(pixels(width, height)).convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def both(clip, content: bytes) -> tuple[torch.Tensor, torch.Tensor]:
    reader = ImageReader(clip)
    return reader.pixels([reader.decode(content)]), clip([load_image(content)], return_tensors="pt")["pixel_values"]


def share_of_range(clip, left: torch.Tensor, right: torch.Tensor) -> float:
    return float(((left - right) * torch.tensor(clip.image_std).view(3, 1, 1)).abs().mean())


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (300, 224), (224, 224), (100, 80), (447, 300), (230, 900)])
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_what_cannot_be_reduced_is_the_processors_to_rounding(clip, size, form):
    fast, whole = both(clip, photo(*size, form=form))
    assert share_of_range(clip, fast, whole) < 1e-3


@pytest.mark.parametrize("size", [(2400, 1800), (1800, 2400), (1000, 750), (2000, 460), (640, 480)])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_what_is_reduced_differs_by_less_than_a_hundredth(clip, size, mode):
    fast, whole = both(clip, photo(*size, mode=mode, quality=90))
    assert share_of_range(clip, fast, whole) < 0.01
    assert not torch.equal(fast, whole) or min(size) < 448


def test_images_of_the_wanted_size_are_the_processors_to_the_bit(clip):
    fast, whole = both(clip, photo(224, 224, form="PNG"))
    assert torch.equal(fast, whole)


def test_exact_is_the_processors_to_the_bit(clip):
    content = photo(1000, 750)
    reader = ImageReader(clip, exact=True)
    whole = clip([load_image(content)], return_tensors="pt")["pixel_values"]
    assert torch.equal(reader.pixels([reader.decode(content)]), whole)


def test_a_processor_with_other_steps_is_obeyed():
    square = CLIPImageProcessorPil(size={"height": 64, "width": 64}, crop_size={"height": 64, "width": 64})
    content = photo(300, 200)
    reader = ImageReader(square)
    assert torch.equal(
        reader.pixels([reader.decode(content)]), square([load_image(content)], return_tensors="pt")["pixel_values"]
    )


@pytest.mark.parametrize(
    ("size", "decoded"), [((1600, 1200), (800, 600)), ((1601, 1201), (801, 601)), ((640, 480), (640, 480))]
)
def test_a_jpeg_is_decoded_at_the_smallest_scale_that_serves(clip, monkeypatch, size, decoded):
    seen = []
    real = ImageReader._resized
    monkeypatch.setattr(ImageReader, "_resized", lambda self, p, *a: seen.append(p.size) or real(self, p, *a))
    content = photo(*size)
    fast, whole = both(clip, content)
    assert seen == [decoded]
    assert share_of_range(clip, fast, whole) < 0.01


def test_other_ways_of_resizing_are_the_processors(clip):
    bilinear = image_processor_of_size(96, resample=2)
    fast, whole = both(bilinear, photo(300, 200))
    assert share_of_range(clip, fast, whole) < 1e-4
