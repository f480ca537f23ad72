"""Random changes of training images against what they are defined to be."""

import io
import random
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from bifocal.data.augmentation import ImageAugmentation
from bifocal.data.images import ImageReader, output_size
from bifocal.errors import RecipeError
from bifocal.modeling.processing_bifocal import image_processor_of_size
from bifocal.training.collator import MultiTaskCollator
from bifocal.training.joint_batches import JointBatchDataset
from bifocal.training.recipe import load_recipe
from bifocal.training.tasks import Task
from tests.modeling.test_images import photo

ALL = ImageAugmentation(
    crop_scale=(0.3, 0.9), horizontal_flip=0.5, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, grayscale=0.1
)


def coordinates(width: int, height: int) -> Image.Image:
    """An image whose red is the column and whose green is the row of each pixel."""
    columns, rows = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([columns, rows, 0 * rows], axis=-1).astype(np.uint8))


def test_equal_draws_give_equal_images_and_others_do_not():
    image = photo(120, 90)
    one, same, other = (np.asarray(ALL(image, random.Random(seed))) for seed in (1, 1, 2))
    assert np.array_equal(one, same)
    assert one.shape != other.shape or not np.array_equal(one, other)


def test_crops_have_the_areas_and_ratios_of_their_definition():
    augmentation = ImageAugmentation(crop_scale=(0.25, 0.75), crop_ratio=(0.5, 2.0))
    generator = random.Random(0)
    areas, ratios, lefts = [], [], []
    for _ in range(800):
        left, top, right, bottom = augmentation._crop((200, 160), generator)
        assert 0 <= left < right <= 200
        assert 0 <= top < bottom <= 160
        areas.append((right - left) * (bottom - top) / (200 * 160))
        ratios.append(np.log((right - left) / (bottom - top)))
        lefts.append(left / max(1, 200 - (right - left)))
    assert min(areas) == pytest.approx(0.25, abs=0.02)
    assert max(areas) == pytest.approx(0.75, abs=0.02)
    assert np.mean(ratios) == pytest.approx(0.0, abs=0.2)
    assert np.mean(lefts) == pytest.approx(0.5, abs=0.05)


def test_a_crop_shows_a_part_of_the_image():
    image = coordinates(200, 100)
    augmentation = ImageAugmentation(crop_scale=(0.1, 0.1), crop_ratio=(1.0, 1.0), side=(32, 32))
    array = np.asarray(augmentation(image, random.Random(3))).astype(float)
    assert array.shape == (32, 32, 3)
    across, down = (array[5:-5, 5:-5, channel] for channel in (0, 1))
    step = np.sqrt(0.1 * 200 * 100) / 32  # pixels of the image for one of the crop
    assert np.diff(across, axis=1).mean() == pytest.approx(step, abs=0.1)
    assert np.diff(down, axis=0).mean() == pytest.approx(step, abs=0.1)


def test_a_crop_that_never_fits_is_the_centre():
    augmentation = ImageAugmentation(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0))
    assert augmentation._crop((300, 100), random.Random(0)) == (100, 0, 200, 100)
    assert augmentation._crop((100, 300), random.Random(0)) == (0, 100, 100, 200)


def test_half_of_the_images_are_mirrored():
    image = coordinates(20, 10)
    mirrored = ImageAugmentation(horizontal_flip=0.5)
    firsts = Counter(np.asarray(mirrored(image, random.Random(seed)))[0, 0, 0] for seed in range(400))
    assert set(firsts) == {0, 19}
    assert 150 < firsts[0] < 250
    assert np.array_equal(
        np.asarray(ImageAugmentation(horizontal_flip=1.0)(image, random.Random(0))), np.asarray(image)[:, ::-1]
    )


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
def test_colours_change_by_the_definition_of_torchvision(name):
    """A blend of the image with black, with its mean grey, and with itself in grey; see torchvision's documentation."""
    image = photo(40, 30)
    pixels = np.asarray(image).astype(float)
    grey = np.asarray(image.convert("L")).astype(float)[:, :, None]
    other = {"brightness": 0.0 * pixels, "contrast": np.full_like(pixels, round(grey.mean())), "saturation": grey}[name]
    generator = random.Random(5)
    result = np.asarray(ImageAugmentation(**{name: 0.5})(image, generator)).astype(float)
    moved, base = result - other, pixels - other
    inside = (result > 2) & (result < 253) & (np.abs(base) > 60)
    factors = (moved / np.where(base == 0, 1, base))[inside]
    assert factors.std() < 0.02
    assert 0.5 <= factors.mean() <= 1.5
    assert abs(factors.mean() - 1.0) > 0.01, "something changed"


def test_a_hue_is_shifted_around_the_circle():
    red = Image.new("RGB", (4, 4), (255, 0, 0))
    shifted = ImageAugmentation(hue=0.5)
    hues = [np.asarray(shifted(red, random.Random(seed)).convert("HSV"))[0, 0, 0] for seed in range(60)]
    assert len(set(hues)) > 30
    assert min(hues) < 40
    assert max(hues) > 215
    assert {np.asarray(shifted(red, random.Random(seed)).convert("HSV"))[0, 0, 2] for seed in range(60)} == {255}


def test_grey_images_have_no_colours():
    grey = np.asarray(ImageAugmentation(grayscale=1.0)(photo(30, 20), random.Random(0)))
    assert np.array_equal(grey[..., 0], grey[..., 1])
    assert np.array_equal(grey[..., 0], grey[..., 2])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"crop_scale": (0.0, 1.0)}, r"crop_scale must be two rising numbers above 0 \(at most 1\)"),
        ({"crop_scale": (0.9, 0.5)}, "crop_scale must be two rising numbers"),
        ({"crop_ratio": (2.0, 0.5)}, "crop_ratio must be two rising numbers"),
        ({"horizontal_flip": 1.5}, "horizontal_flip must be from 0 to 1, but it is 1.5"),
        ({"brightness": -1.0}, "brightness must be at least 0, but it is -1"),
        ({"hue": 0.6}, "hue must be from 0 to 0.5, but it is 0.6"),
    ],
)
def test_values_out_of_range(values, message):
    with pytest.raises(ValueError, match=message):
        ImageAugmentation(**values)


def test_a_jpeg_is_decoded_large_enough_for_the_smallest_crop():
    processor = image_processor_of_size(32)
    buffer = io.BytesIO()
    photo(800, 800).save(buffer, "JPEG")
    whole = ImageReader(processor, crop=False).decode(buffer.getvalue())
    small = ImageAugmentation(crop_scale=(0.08, 1.0), crop_ratio=(1.0, 1.0))
    assert small.smallest_side == pytest.approx(np.sqrt(0.08))
    part = ImageReader(processor, crop=False, smallest_side=small.smallest_side).decode(buffer.getvalue())
    assert whole.size[0] < part.size[0]
    assert part.size[0] * small.smallest_side >= 32


def _batches(processor, augment, rank: int = 0, workers: int = 0) -> list[torch.Tensor]:
    rows = [{"image": photo(50 + number, 60), "caption": f"photo {number}"} for number in range(12)]
    task = Task("photos", "image-text", rows, batch_size=4)
    from torch.utils.data import DataLoader

    from bifocal.training.engine.distributed import ProcessGroupInfo

    collator = MultiTaskCollator(processor, 16, 0, augment, rank)
    data = JointBatchDataset([task], 3, 0, ProcessGroupInfo())
    loader = DataLoader(data, batch_size=1, collate_fn=collator, num_workers=workers)
    return [torch.cat([part["pixel_values"] for part in batch["images"]]) for batch in loader]


def test_a_step_is_the_same_in_workers_and_another_in_another_process(processor):
    one, again, workers = (_batches(processor, ALL, workers=count) for count in (0, 0, 2))
    other = _batches(processor, ALL, rank=1)
    plain = _batches(processor, None)
    for number in range(3):
        assert torch.equal(one[number], again[number])
        assert torch.equal(one[number], workers[number])
        assert not torch.equal(one[number], other[number])
        assert not torch.equal(one[number], plain[number])
        assert one[number].shape == plain[number].shape


def test_the_size_of_an_image_processor(processor):
    assert output_size(image_processor_of_size(48)) == (48, 48)


def test_recipes_name_augmentations(tmp_path):
    path = tmp_path / "mine.yaml"
    text = (
        "name: mine\ntokenizer_vocab_size: 300\ntraining: {max_steps: 2}\ntasks: [{name: a, kind: image-text, "
        "batch_size: 2, data: {path: images}}]\naugment: "
    )
    path.write_text(text + "{crop_scale: [0.9, 1.0], horizontal_flip: 0.5, hue: 0.1}\n")
    recipe = load_recipe(path)
    assert ImageAugmentation(**recipe.augment.model_dump()) == ImageAugmentation(
        (0.9, 1.0), horizontal_flip=0.5, hue=0.1
    )
    for wrong, message in (
        ("{flip: 0.5}", "unknown key 'flip'"),
        ("{hue: 2}", "hue must be from 0 to 0.5, but it is 2"),
        ("{crop_scale: 3}", "'crop_scale' is 3, but: input should be a valid tuple"),
        ("blur", "augment is 'blur', but it must be shift, or keys such as crop_scale"),
    ):
        path.write_text(text + wrong + "\n")
        with pytest.raises(RecipeError, match=message):
            load_recipe(path)
