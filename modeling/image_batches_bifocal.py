# Copyright 2026 The Bifocal authors. Licensed under the Apache License, Version 2.0.
"""Images on their way to the model: decoded and resized in threads ahead of it, normalised on its device."""

import inspect
import math
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import SizeDict

from .encoding_options_bifocal import whole_number
from .image_bifocal import DecodedImage, decode_image, image_name

EmbeddedImages = Generator[tuple[Any, Any], None, None]  # a note and a vector for each image
_MAX_DEFAULT_WORKERS = 16
_LARGEST_RESIZED = 2**25  # pixels of an image before it is cropped: 100 MB; 1 x 3,000 pixels would become 450 MB
_MAX_PIXELS_IN_MEMORY = 2**28  # of images that stay at full size, 0.8 GB
# A JPEG is decoded at reduced scale as long as its shorter side stays at least this many times that of the model.
MARGIN = 1.5


class Steps(NamedTuple):
    """What an image processor does before it normalises.

    Args:
        size: (width, height) of resized images, or the length of their shorter side; None if they are not resized.
        resample: Pillow's filter for resizing.
        crop: (height, width) of the centre that is kept; None if all is.
    """

    size: tuple[int, int] | int | None
    resample: int
    crop: tuple[int, int] | None


@dataclass(frozen=True, eq=False)
class PreparedImage:
    """An image that is decoded, resized and cropped, but not normalised.

    Args:
        pixels: (3, height, width) bytes.
        steps: what was done to it.
    """

    pixels: np.ndarray
    steps: Steps


class NarrowImageError(ValueError):
    """An image whose shorter side is so short that resizing it would fill the memory."""


class ImagePreparer:
    """Does what an image processor does, in two halves: resized bytes in any thread, pixel values on the device.

    Transformers' processors with Pillow that resize, crop, rescale and normalise are followed exactly, to the bit.
    Images of any other processor are decoded here and handed to it whole.

    Args:
        processor: image processor of any family; None if images are only decoded.
        fast_decoding: decode JPEGs at a half, a quarter or an eighth of their size where that suffices. Has no effect
            on other images, Pillow images and arrays, and with processors that are not followed.
    """

    def __init__(self, processor: Any = None, fast_decoding: bool = False) -> None:
        self.processor = processor
        self.steps = _steps(processor)
        self.smallest_side: int | None = None
        if self.steps is not None:
            # Where another size was set it may be a plain dict, which `center_crop` does not take.
            self.crop_size = None if self.steps.crop is None else SizeDict(**dict(processor.crop_size))
            self.mean, self.std = (
                torch.from_numpy(np.broadcast_to(np.asarray(values, np.float32), 3).copy()).view(3, 1, 1)
                for values in (processor.image_mean, processor.image_std)
            )
            size = self.steps.size
            if fast_decoding and size is not None:
                self.smallest_side = int(MARGIN * (size if isinstance(size, int) else max(size)))

    def decode(self, source: Any, name: str | None = None, smallest_side: int = 0) -> DecodedImage:
        """Decode an image, at reduced scale if that was chosen.

        Args:
            source, name: as for `load_image`.
            smallest_side: length that the shorter side keeps in any case.

        Raises:
            FileNotFoundError, ValueError: as for `load_image`.
            NarrowImageError: if it would need too much memory before it is cropped.
        """
        decoded = decode_image(source, name, self.smallest_side and max(self.smallest_side, smallest_side))
        if self.steps is not None and self.steps.size is not None:
            width, height = decoded.image.size
            if math.prod(_new_size(width, height, self.steps.size)) > _LARGEST_RESIZED:
                raise NarrowImageError(
                    f"{name or 'The image'} is too narrow to embed ({width} x {height} pixels); crop it."
                )
        return decoded

    def prepare(self, decoded: DecodedImage) -> PreparedImage | Image.Image:
        """Resize and crop an image; return it whole if the processor has to do that."""
        image, steps = decoded.image, self.steps
        if steps is None:
            return image
        if steps.size is not None:
            width, height = image.size if decoded.box is None else decoded.box[2:]
            image = image.resize(_new_size(width, height, steps.size), steps.resample, decoded.box)
        pixels = np.asarray(image).transpose(2, 0, 1)
        if steps.crop is not None:
            pixels = self.processor.center_crop(pixels, self.crop_size)
        return PreparedImage(np.array(pixels, order="C"), steps)

    def load(self, numbered: tuple[int, Any]) -> PreparedImage | Image.Image:
        """Decode and prepare an image that is given with its position, by which errors name it if it has no path.

        Raises:
            FileNotFoundError, ValueError: as for `load_image`, and if the image was prepared for another processor.
        """
        position, source = numbered
        if isinstance(source, PreparedImage):
            if source.steps != self.steps:
                raise ValueError(f"Image {position} was prepared for another image processor; prepare it again.")
            return source
        return self.prepare(self.decode(source, image_name(source, position)))

    def pixel_values(self, images: Iterable[Any], count: int, device: torch.device) -> torch.Tensor:
        """Return the pixel values (images, 3, height, width) of prepared images, on a device.

        Args:
            images: as from `prepare`.
            count: how many there are.
            device: device of the model. Bytes are copied to it and normalised there.
        """
        if self.steps is None:
            return self.processor(list(images), return_tensors="pt")["pixel_values"].to(device)
        images = iter(images)
        first = next(images).pixels
        batch = torch.empty((count, *first.shape), dtype=torch.uint8, pin_memory=device.type == "cuda")
        rows = batch.numpy()
        rows[0] = first
        for row, image in enumerate(images, 1):
            rows[row] = image.pixels
        # Only from pinned memory: any other could be reused before it is read.
        values = batch.to(device, non_blocking=device.type == "cuda").float()
        # In this order and by division, each value equals the processor's to the bit.
        return values.div_(255.0).sub_(self.mean.to(device)).div_(self.std.to(device))

    def images_ahead(self, batch_size: int) -> int:
        """Return how many images may be prepared ahead, besides two for each worker."""
        return 0 if self.steps is None else batch_size  # whole images would fill the memory


class ImageWorkers:
    """Threads that prepare images ahead of their use. It is a context manager, at whose end none of them is left.

    Args:
        num_workers: number of threads; 0 prepares each image when it is used, in the thread that uses it. If None, the
            number of cores this process may use, 16 at most.
        count: number of images, if it is known: one image needs no threads.

    Raises:
        ValueError: if num_workers is not a whole number from 0.
    """

    def __init__(self, num_workers: int | None = None, count: int | None = None) -> None:
        if num_workers is None:
            num_workers = min(_available_cores(), _MAX_DEFAULT_WORKERS)
        num_workers = whole_number("num_workers", num_workers, 0)
        self.num_workers = 0 if count is not None and count < 2 else num_workers
        self._pool: ThreadPoolExecutor | None = None

    def __enter__(self) -> "ImageWorkers":
        if self.num_workers:  # its threads start when they are needed
            # Pillow imports most formats when it meets one; a thread that looks meanwhile finds no format at all.
            Image.init()
            self._pool = ThreadPoolExecutor(self.num_workers, thread_name_prefix="bifocal-images")
        return self

    def __exit__(self, *error: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def map(self, function: Callable[[Any], Any], items: Iterable[Any], ahead: int) -> Iterator[Any]:
        """Yield `function(item)` of each item in order, computed ahead; an error is raised in its item's turn.

        Args:
            function: called in the threads.
            items: read in the thread that iterates.
            ahead: how many results may wait, besides two for each worker.
        """
        if self._pool is None:
            yield from map(function, items)
            return
        items, exhausted = iter(items), object()
        results: deque[Future[Any]] = deque()
        item = next(items, exhausted)
        while results or item is not exhausted:
            while item is not exhausted and len(results) < ahead + 2 * self.num_workers:
                results.append(self._pool.submit(function, _on_cpu(item)))
                item = next(items, exhausted)
            yield results.popleft().result()


def embed_ahead(
    items: Iterable[Any], read: Callable[[Any], tuple[Any, Any]], embed: Callable[[list[Any]], Iterable[Any]],
    preparer: ImagePreparer, batch_size: int, num_workers: int | None = None,
) -> EmbeddedImages:  # fmt: skip
    """Read and prepare images in threads, embed them in batches, and yield a note and a vector for each item, in order.

    Close this generator where it may not be exhausted: with it, its threads end.

    Args:
        items: what is read; iterated in the calling thread.
        read: returns from an item a note and its image as the preparer's `prepare` returns it; None instead of an image
            for an item that is not embedded, whose vector is None. Called in the threads.
        embed: returns the vectors of images.
        preparer: the preparer that `read` uses.
        batch_size: images per call of `embed`.
        num_workers: see `ImageWorkers`.
    """
    waiting: list[tuple[Any, Any]] = []

    def embedded() -> Iterator[tuple[Any, Any]]:
        images = [image for _, image in waiting if image is not None]
        vectors = iter(embed(images) if images else ())
        for note, image in waiting:
            yield note, None if image is None else next(vectors)
        waiting.clear()

    count = pixels = 0
    with ImageWorkers(num_workers) as workers:
        for note, image in workers.map(read, items, preparer.images_ahead(batch_size)):
            waiting.append((note, image))
            count += image is not None
            pixels += image.width * image.height if isinstance(image, Image.Image) else 0
            if count == batch_size or pixels > _MAX_PIXELS_IN_MEMORY:
                count = pixels = 0
                yield from embedded()
        yield from embedded()


def _available_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _on_cpu(item: Any) -> Any:
    """Return an item, a tensor in it copied from its device: other threads do not wait for what computes it."""
    if type(item) is tuple:
        return tuple(map(_on_cpu, item))
    return item.detach().cpu() if isinstance(item, torch.Tensor) and item.device.type != "cpu" else item


def _new_size(width: float, height: float, size: tuple[int, int] | int) -> tuple[int, int]:
    """Return width and height of an image after resizing."""
    if not isinstance(size, int):
        return size
    longer = int(size * max(width, height) / min(width, height))
    return (size, longer) if width <= height else (longer, size)


def _steps(processor: Any) -> Steps | None:
    """Return what a processor does before it normalises; None if it does anything else, or in another way."""
    if not _adds_only_settings(type(processor)):
        return None
    size = dict(processor.size or {}) if processor.do_resize else {}
    crop = dict(processor.crop_size or {}) if processor.do_center_crop else {}
    width_and_height = {"width", "height"}
    usual = (
        processor.do_rescale and processor.do_normalize and not processor.do_pad
        and processor.rescale_factor == 1 / 255
        and processor.data_format in (None, "channels_first") and processor.input_data_format is None
        and all(np.shape(values) in ((), (3,)) for values in (processor.image_mean, processor.image_std))
        and isinstance(processor.resample, int)
        and (not processor.do_resize or set(size) in ({"shortest_edge"}, width_and_height))
        and (not processor.do_center_crop or set(crop) == width_and_height)
        and (processor.do_center_crop or set(size) == width_and_height)  # otherwise, images differ in size
    )  # fmt: skip
    if not usual:
        return None
    resized = size.get("shortest_edge") or (size["width"], size["height"]) if size else None
    return Steps(resized, int(processor.resample), (crop["height"], crop["width"]) if crop else None)


def _adds_only_settings(kind: type) -> bool:
    """Return whether a class has the methods of transformers' image processors with Pillow, and no others."""
    own = [base for base in kind.__mro__ if base not in PilBackend.__mro__]
    return issubclass(kind, PilBackend) and not any(
        inspect.isroutine(value) or isinstance(value, property | classmethod | staticmethod)
        for base in own
        for name, value in vars(base).items()
        if name != "__init__"
    )
