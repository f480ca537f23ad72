"""Images are prepared in threads as the image processor prepares them, in order, and no thread outlives its call."""

import io
import os
import tarfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.clip import CLIPImageProcessorPil
from transformers.models.siglip import SiglipImageProcessorPil

from bifocal.modeling import load_image
from bifocal.modeling.image_batches_bifocal import ImagePreparer, ImageWorkers, NarrowImageError, embed_ahead
from tests import families
from tests.modeling.test_images import jpeg, photo, png

CPU = torch.device("cpu")


def sources() -> list:
    """JPEGs and PNGs, grey, transparent and turned, larger, smaller and narrower than the image tower."""
    transparent = photo(50, 70).convert("RGBA")
    transparent.putalpha(Image.linear_gradient("L").resize((50, 70)))
    exif = Image.Exif()
    exif[0x0112] = 6
    return [
        jpeg(photo(400, 300)), jpeg(photo(301, 517)), png(photo(20, 90)), png(photo(33, 32).convert("L")),
        jpeg(photo(64, 64).convert("L")), png(transparent), jpeg(photo(90, 40), exif=exif), png(photo(32, 32)),
        png(photo(1, 1)), png(photo(3, 200)), photo(77, 78).convert("P"), np.asarray(photo(31, 45)),
    ]  # fmt: skip


def resized_later() -> CLIPImageProcessorPil:
    processor = CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24})
    processor.crop_size = {"height": 20, "width": 18}  # a plain dict, as a recipe's `image_size` sets
    return processor


def image_processors() -> dict:
    found = {name: lambda build=build: build()[1].image_processor for name, build in families.DUAL_ENCODERS.items()}
    found |= {name: lambda build=build: build()[1] for name, build in families.IMAGE_TOWERS.items()}
    crop = {"height": 40, "width": 36}
    return found | {
        "CLIP that pads": lambda: CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size=crop),
        "CLIP with a crop set later": resized_later,
        "CLIP without resizing": lambda: CLIPImageProcessorPil(do_resize=False, crop_size=crop),
        "SigLIP that is not square": lambda: SiglipImageProcessorPil(size={"height": 30, "width": 50}),
        "one mean": lambda: SiglipImageProcessorPil(size={"height": 30, "width": 50}, image_mean=0.4, image_std=0.3),
    }


@pytest.mark.parametrize("name", image_processors())
def test_pixel_values_are_the_processors(name):
    processor = image_processors()[name]()
    preparer = ImagePreparer(processor)
    assert preparer.steps is not None
    prepared = [preparer.load((number, source)) for number, source in enumerate(sources())]
    assert all(image.pixels.dtype == np.uint8 for image in prepared)
    values = preparer.pixel_values(prepared, len(prepared), CPU)
    expected = processor([load_image(source) for source in sources()], return_tensors="pt")["pixel_values"]
    assert values.dtype == expected.dtype == torch.float32
    assert values.is_contiguous()
    assert torch.equal(values, expected)


class Inverted(CLIPImageProcessorPil):
    """A processor with a step of its own."""

    def resize(self, image, *args, **options):
        return super().resize(255 - image, *args, **options)


class Renamed(CLIPImageProcessorPil):
    image_mean = [0.1, 0.2, 0.3]


SMALL = dict(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})


@pytest.mark.parametrize(
    "processor",
    [
        Inverted(**SMALL), CLIPImageProcessorPil(**SMALL, do_normalize=False),
        CLIPImageProcessorPil(**SMALL, do_pad=True, pad_size={"height": 32, "width": 32}),
        CLIPImageProcessorPil(**SMALL, rescale_factor=1 / 127.5), CLIPImageProcessorPil(**SMALL, do_rescale=False),
    ],
)  # fmt: skip
def test_other_processors_get_whole_images(model, processor):
    preparer = ImagePreparer(processor, fast_decoding=True)
    assert preparer.steps is None
    images = [preparer.load((number, source)) for number, source in enumerate(sources())]
    expected = processor([load_image(source) for source in sources()], return_tensors="pt")["pixel_values"]
    assert torch.equal(preparer.pixel_values(images, len(images), CPU), expected)


def test_a_class_that_only_changes_settings_is_followed():
    assert ImagePreparer(Renamed(**SMALL)).mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])


@pytest.mark.parametrize("batch_size", [1, 5, 32])
def test_vectors_do_not_depend_on_the_workers(model, batch_size):
    images = sources() * 2
    alone = model.encode_image(images, batch_size=batch_size, num_workers=0)
    for num_workers in (1, 2, 7, None):
        vectors = model.encode_image(images, batch_size=batch_size, num_workers=num_workers)
        np.testing.assert_array_equal(vectors, alone)
    with ThreadPoolExecutor(4) as pool:
        for vectors in pool.map(lambda _: model.encode_image(images, batch_size=batch_size, num_workers=2), range(8)):
            np.testing.assert_array_equal(vectors, alone)


@pytest.fixture(autouse=True)
def no_thread_is_left():
    before = set(threading.enumerate())
    yield
    left = [thread.name for thread in threading.enumerate() if thread not in before]
    assert not [name for name in left if name.startswith("bifocal-images")]


def workers_alive() -> int:
    return sum(thread.name.startswith("bifocal-images") for thread in threading.enumerate())


@pytest.mark.parametrize("num_workers", [0, 1, 4])
def test_the_first_broken_image_is_named(model, tmp_path, num_workers):
    (tmp_path / "cut.png").write_bytes(png(photo(900, 700))[:-400])  # slower to fail than the next one
    images = [photo()] * 3 + [str(tmp_path / "cut.png"), b"nothing", tmp_path / "nowhere.png"]
    with pytest.raises(ValueError, match=r"cut\.png' is a broken image"):
        model.encode_image(images, batch_size=2, num_workers=num_workers)
    assert workers_alive() == 0
    with pytest.raises(ValueError, match="Image 3 is not an image of a format Pillow can read"):
        model.encode_image([*images[:3], *images[4:]], batch_size=2, num_workers=num_workers)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.png' does not exist"):
        model.encode_image([photo(), images[-1]], num_workers=num_workers)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_threads_end_when_the_model_fails(model, monkeypatch, error):
    def fail(*_, **options):
        assert workers_alive()
        raise error

    monkeypatch.setattr(model, "get_image_features", fail)
    with pytest.raises(error) as caught:
        model.encode_image([photo(300, 200)] * 40, batch_size=2, num_workers=3)
    assert workers_alive() == 0
    assert caught  # while the error and its frames are still referenced


def test_threads_end_with_a_closed_generator():
    preparer = ImagePreparer(CLIPImageProcessorPil(**SMALL))
    rows = embed_ahead(
        range(1000), lambda number: (number, preparer.load((number, photo()))), lambda images: images, preparer, 4, 2
    )
    with closing(rows):
        assert [next(rows)[0] for _ in range(6)] == list(range(6))
        assert workers_alive() == 2
    assert workers_alive() == 0


def test_no_more_is_read_than_is_needed_ahead():
    started = []
    with ImageWorkers(2) as workers:
        results = workers.map(lambda number: started.append(number) or number, range(1000), 5)
        for number in range(100):
            assert next(results) == number
            time.sleep(0.001)
            assert len(started) <= number + 1 + 5 + 2 * 2
    assert len(started) < 120


def test_items_keep_their_order_and_notes():
    preparer = ImagePreparer(CLIPImageProcessorPil(**SMALL))

    def read(number: int):
        time.sleep(0.003 if number % 3 == 0 else 0.0)
        return number, None if number % 5 == 0 else preparer.load((number, photo(40 + number, 40)))

    batches = []

    def embed(images: list) -> np.ndarray:
        batches.append(len(images))
        return preparer.pixel_values(images, len(images), CPU).flatten(1).numpy()

    found = list(embed_ahead(range(23), read, embed, preparer, 4, 3))
    assert [note for note, _ in found] == list(range(23))
    assert batches == [4, 4, 4, 4, 2]
    for note, vector in found:
        if note % 5 == 0:
            assert vector is None
        else:
            expected = preparer.pixel_values([preparer.load((0, photo(40 + note, 40)))], 1, CPU)
            np.testing.assert_array_equal(vector, expected.flatten())
    assert list(embed_ahead([], read, embed, preparer, 4, 3)) == []


def test_file_objects_that_share_a_file(model, tmp_path):
    photos = [jpeg(photo(400 + number, 300)) for number in range(12)]
    with tarfile.open(tmp_path / "photos.tar", "w") as tar:
        for number, content in enumerate(photos):
            member = tarfile.TarInfo(f"{number}.jpg")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    expected = model.encode_image(photos, num_workers=0)
    with tarfile.open(tmp_path / "photos.tar") as tar:
        files = [tar.extractfile(f"{number}.jpg") for number in range(12)]
        np.testing.assert_array_equal(model.encode_image(files, num_workers=4), expected)
        lazy = [Image.open(tar.extractfile(f"{number}.jpg")) for number in range(12)]
        np.testing.assert_array_equal(model.encode_image(lazy, num_workers=4), expected)
    stream = io.BytesIO(photos[0])
    for one in (stream, Image.open(stream)):
        np.testing.assert_array_equal(model.encode_image([one] * 12, num_workers=4), expected[[0] * 12])


def test_prepared_images_are_embedded_by_their_model(model):
    images = sources()
    preparer = model.image_preparer()
    prepared = [preparer.load((number, source)) for number, source in enumerate(images)]
    np.testing.assert_array_equal(model.encode_image(prepared, num_workers=3), model.encode_image(images))
    other = ImagePreparer(CLIPImageProcessorPil(size={"shortest_edge": 48}, crop_size={"height": 32, "width": 32}))
    with pytest.raises(ValueError, match="Image 1 was prepared for another image processor; prepare it again"):
        model.encode_image([prepared[0], other.load((0, photo()))])


def spots(width: int, height: int) -> Image.Image:
    """Coloured spots: an image whose vector depends on where things are."""
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x * 9 / width + 2 * channel) * np.cos(y * 7 / height + channel) for channel in range(3)]
    return Image.fromarray((127 + 120 * np.stack(waves, -1)).astype(np.uint8))


@pytest.mark.parametrize("size", [(1600, 1200), (749, 1001), (120, 90)])
def test_fast_decoding_is_close(model, size):
    content = jpeg(spots(*size))
    exact, fast = model.image_preparer(), model.image_preparer(fast_decoding=True)
    decoded = fast.decode(content)
    assert (decoded.image.width < size[0]) is (size[0] > 200)
    assert min(decoded.image.size) >= 1.5 * 32
    pixels = [preparer.load((0, content)).pixels.astype(int) for preparer in (exact, fast)]
    assert abs(pixels[0] - pixels[1]).mean() < 0.01 * 255
    vectors = [model.encode_image([content], fast_decoding=fast)[0] for fast in (False, True)]
    assert vectors[0] @ vectors[1] > 0.999
    assert np.array_equal(*vectors) is (size[0] < 200)
    for same in (png(spots(*size)), spots(*size), Image.open(io.BytesIO(content)), np.asarray(spots(*size))):
        np.testing.assert_array_equal(
            model.encode_image([same], fast_decoding=True), model.encode_image([same], fast_decoding=False)
        )


def test_fast_decoding_turns_images_and_finds_cut_ones(model):
    exif = Image.Exif()
    exif[0x0112] = 6
    content = jpeg(spots(900, 700), exif=exif)
    exact, fast = (model.image_preparer(fast).load((0, content)).pixels.astype(int) for fast in (False, True))
    assert abs(exact - fast).mean() < 0.01 * 255
    with pytest.raises(ValueError, match="Image 0 is a broken image"):
        model.encode_image([jpeg(spots(900, 700))[:-3000]], fast_decoding=True)


def test_pillow_knows_all_formats_before_threads_start(monkeypatch):
    calls = []
    monkeypatch.setattr(Image, "init", lambda: calls.append(1))
    with ImageWorkers(0), ImageWorkers(5, count=1):
        assert not calls
    with ImageWorkers(2):
        assert calls


@pytest.mark.parametrize("num_workers", [-1, 1.5, True, "two"])
def test_a_number_of_workers_that_is_none(model, num_workers):
    with pytest.raises(ValueError, match="num_workers must be at least 0, but it is"):
        model.encode_image([photo()], num_workers=num_workers)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_child_that_is_forked_meanwhile_has_workers_of_its_own():
    with ImageWorkers(2) as workers:
        results = workers.map(lambda number: time.sleep(0.002) or number, range(50), 8)
        next(results)
        child = os.fork()
        if child == 0:
            status = 1
            try:
                with ImageWorkers(2) as own:
                    status = 0 if list(own.map(abs, [-1, -2, -3], 1)) == [1, 2, 3] else 1
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert list(results) == list(range(1, 50))


def test_an_image_that_would_fill_the_memory_is_refused(processor):
    """Its shorter side becomes that of the model, and its longer one grows with it."""
    preparer = ImagePreparer(
        CLIPImageProcessorPil(size={"shortest_edge": 224}, crop_size={"height": 224, "width": 224})
    )
    with pytest.raises(NarrowImageError, match=r"narrow.png' is too narrow to embed \(1 x 3000 pixels\); crop it"):
        preparer.decode(Image.new("RGB", (1, 3000)), "Image 'narrow.png'")
    assert preparer.decode(Image.new("RGB", (30, 9000))).image.size == (30, 9000)
