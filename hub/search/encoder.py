"""A model that any number of threads embed with at once: what waits at the same time is embedded together."""

import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from PIL import Image

from bifocal.embedding.items import ItemError, decode_item, image_pixels, normalize
from bifocal.embedding.models import EmbeddingModel
from bifocal.hub.search.batching import Batcher
from bifocal.hub.search.hits import QueryError
from bifocal.modeling.image_batches_bifocal import PreparedImage

BATCH_SIZE = 64
IMAGE_TOKENS = 256  # about as many as patches of an image
_TOKENS_PER_TEXT = 32  # a batch has as many tokens as its most texts have on average, so that nobody waits long for it
_LONG_TEXT = 128  # tokens; longer texts, and lists, wait for each other, and no single short text or image for them
_BYTES_PER_TOKEN = 4  # of UTF-8, about
_DECODED_AT_ONCE = 4  # images; a large one takes hundreds of megabytes until it is resized
_MAX_PIXELS = 2**27  # of all images at once that stay at full size until they are embedded; Pillow has 4 bytes each


@dataclass(frozen=True)
class Piece:
    """Texts and images of one caller that are embedded in one call.

    Args:
        texts: without a prompt.
        images: as from `Encoder.prepare`.
        role: "query" or "document"; see `EmbeddingModel.encode_text`.
        prompt: text that goes before each text.
        text_tokens: tokens of all texts, or about as many.
    """

    texts: tuple[str, ...] = ()
    images: tuple[PreparedImage | Image.Image, ...] = ()
    role: str = "query"
    prompt: str = ""
    text_tokens: int = 0

    @property
    def cost(self) -> int:
        """About the number of tokens to embed."""
        return max(self.text_tokens, _TOKENS_PER_TEXT * len(self.texts)) + IMAGE_TOKENS * len(self.images)

    @property
    def is_short(self) -> bool:
        """Whether others may wait for this: at most a short text and an image."""
        return max(len(self.texts), len(self.images)) <= 1 and self.text_tokens <= _LONG_TEXT


Vectors = tuple[np.ndarray, np.ndarray]


class Encoder:
    """A model for any number of threads.

    Pieces of threads that wait at the same time are embedded together (see `Batcher`): each gets what it would get
    alone, to float32's precision. A thread has one piece in the queue at a time, so that a caller who cuts a long list
    into pieces of `max_cost` shares the model evenly with all others.

    Args:
        model: embeds texts, and images if it can.
        batch_size: most texts that are embedded together; with 1, each thread embeds its own.
        fast_decoding: see `encode_image` of a model.
        watch: called with the pieces of each batch before it is embedded.
    """

    def __init__(
        self,
        model: EmbeddingModel,
        batch_size: int = BATCH_SIZE,
        fast_decoding: bool = False,
        watch: Callable[[Sequence[Piece]], None] = lambda pieces: None,
    ) -> None:
        self.model, self.fast_decoding, self.watch = model, fast_decoding, watch
        self.max_cost = _TOKENS_PER_TEXT * batch_size
        self.short, self.long = (
            Batcher(self._run, lambda piece: piece.cost, batch_size, self.max_cost) for _ in range(2)
        )
        self._decoding = threading.Semaphore(_DECODED_AT_ONCE)
        self._whole = _PixelLimit(_MAX_PIXELS)

    @cached_property
    def resizes_images(self) -> bool:
        """Whether `prepare` makes images small; otherwise the model's own processor does, when it embeds them."""
        return self.model.image_preparer(self.fast_decoding).steps is not None

    def image_cost(self, image: Any) -> int:
        """Return the cost of an image in a piece; pieces of images that stay at full size have fewer of them.

        Args:
            image: as for `prepare`.
        """
        if self.resizes_images:
            return IMAGE_TOKENS
        return max(IMAGE_TOKENS, self.max_cost * image_pixels(image) // _MAX_PIXELS)

    @contextmanager
    def room_for(self, images: Sequence[Any]) -> Iterator[None]:
        """Wait for memory to prepare images, and hold it until they are embedded.

        Args:
            images: all images of a piece, as for `prepare`.
        """
        if not images or not self.model.embeds_images or self.resizes_images:
            yield
            return
        with self._whole.hold(sum(map(image_pixels, images))):
            yield

    def prepare(self, image: Any) -> PreparedImage | Image.Image:
        """Return an image decoded and resized for the model, in this thread.

        Args:
            image: a Pillow image, a path or the bytes of a file, up to 64 million pixels.

        Raises:
            QueryError: if the model embeds no images, or the image cannot be read. The message names no file.
        """
        if not self.model.embeds_images:
            raise QueryError("The model embeds no images. Use texts only, or a model that embeds both.")
        try:
            preparer = self.model.image_preparer(self.fast_decoding)
            with self._decoding:
                return preparer.prepare(decode_item(image, preparer))
        except ItemError as error:
            raise QueryError(f"The image cannot be used: {error}. Choose another one.") from error

    def embed(self, piece: Piece) -> Vectors:
        """Return the unit vectors of a piece's texts (texts, dimensions) and images (images, dimensions)."""
        return (self.short if piece.is_short else self.long)(piece)

    def _run(self, pieces: Sequence[Piece]) -> list[Vectors]:
        """Return the vectors of pieces: all images in one call, and all texts of the same role and prompt in one."""
        self.watch(pieces)
        images = [image for piece in pieces for image in piece.images]
        of_images = iter(normalize(self.model.encode_image(images, len(images)))) if images else iter(())
        texts: dict[tuple[str, str], list[str]] = defaultdict(list)
        for piece in pieces:
            if piece.texts:
                texts[piece.role, piece.prompt] += piece.texts
        of_texts = {
            (role, prompt): iter(normalize(self.model.encode_text(group, role, prompt, len(group))))
            for (role, prompt), group in texts.items()
        }
        return [
            (_take(of_texts.get((piece.role, piece.prompt)), piece.texts), _take(of_images, piece.images))
            for piece in pieces
        ]


class _PixelLimit:
    """A limit on the pixels of images that are in memory at once. Who waits first is first.

    Args:
        limit: most pixels; more are accepted when there is nothing else.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.used = limit, 0
        self._first = threading.Lock()
        self._freed = threading.Condition()

    @contextmanager
    def hold(self, pixels: int) -> Iterator[None]:
        """Wait until there is room for pixels, and hold it."""
        with self._first, self._freed:
            self._freed.wait_for(lambda: not self.used or self.used + pixels <= self.limit)
            self.used += pixels
        try:
            yield
        finally:
            with self._freed:
                self.used -= pixels
                self._freed.notify_all()


def _take(vectors: Any, of: Sequence[Any]) -> np.ndarray:
    """Return the next vectors of an iterator, one for each input; an empty array for no inputs."""
    return np.stack([next(vectors) for _ in of]) if of else np.empty((0, 0), np.float32)


def about_tokens(text: str) -> int:
    """Return about the number of tokens of a text."""
    return 1 + len(text.encode()) // _BYTES_PER_TOKEN if text else 0
