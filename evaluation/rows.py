"""Rows of an evaluation. Those that cannot be used are skipped, counted and named, as when files are read."""

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers.utils import logging

from bifocal.data.image_errors import image_row_error
from bifocal.data.normalize import RowNormaliser, as_list
from bifocal.data.skips import RowError, SkippedRow, summary
from bifocal.embedding.items import Item, ItemError
from bifocal.errors import EvaluationError
from bifocal.evaluation.encoders import Encoder
from bifocal.modeling.image_batches_bifocal import ImagePreparer
from bifocal.modeling.image_bifocal import DecodedImage

logger = logging.get_logger(__name__)
_NAMED = 3  # skipped rows that a warning names
_LONGEST_SCHEME = 16  # characters of a URL's beginning


def as_sequence(task: str, what: str, values: Any) -> Any:
    """Return the values of a column as a sequence.

    Args:
        task: name of the data set.
        what: name of the column, in the plural.
        values: one value per row.

    Raises:
        EvaluationError: if `values` is a single string, mapping or image.
    """
    if isinstance(values, str | bytes | Mapping | Image.Image):
        kind = "dictionary" if isinstance(values, Mapping) else type(values).__name__
        raise EvaluationError(f"The {what} of '{task}' are a single {kind}; give a list, one item for each row.")
    if hasattr(values, "__len__") and hasattr(values, "__getitem__"):
        return values
    if isinstance(values, Iterable):
        return list(values)
    raise EvaluationError(f"The {what} of '{task}' are a {type(values).__name__}; give a list, one item for each row.")


class Selection(Sequence):
    """Some items of a sequence, read on access."""

    def __init__(self, items: Any, numbers: Sequence[int]) -> None:
        self.items, self.numbers = items, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, number: Any) -> Any:
        return self.items[self.numbers[number]]


class Rows:
    """The rows of one data set, some of which may be unusable.

    Args:
        task: name of the data set, for messages.
        names: name of each row; numbers if None.
        warn: whether to log a warning about skipped rows; if None, only if the rows have no names.
        columns: values of each column, all of the same length.

    Attributes:
        skipped: reasons for skipping, by number of the row.

    Raises:
        EvaluationError: if columns differ in length or there is no row.
    """

    def __init__(self, task: str, names: Sequence[str] | None = None, warn: bool | None = None, **columns: Any) -> None:
        self.task, self.names = task, names
        self.warn = names is None if warn is None else warn
        self.columns = {what: as_sequence(task, what, values) for what, values in columns.items()}
        lengths = {what: len(values) for what, values in self.columns.items()}
        if len(set(lengths.values())) > 1:
            counts = " and ".join(f"{count:,} {what}" for what, count in lengths.items())
            raise EvaluationError(f"'{task}' has {counts}; give one of each per row.")
        self.count = next(iter(lengths.values()))
        self.skipped: dict[int, RowError] = {}
        self._normalise = RowNormaliser("image-text")
        if not self.count:
            raise EvaluationError(f"'{task}' has no rows; check the source of its {next(iter(lengths))}.")

    @property
    def good(self) -> list[int]:
        """Numbers of the rows that are not skipped."""
        return [number for number in range(self.count) if number not in self.skipped]

    @property
    def skips(self) -> list[SkippedRow]:
        """The skipped rows with their names."""
        return [SkippedRow.of(self.name(number), self.skipped[number]) for number in sorted(self.skipped)]

    def name(self, number: int) -> str:
        return str(self.names[number]) if self.names is not None else f"{self.task}:{number}"

    def texts(self, what: str, column: str, most: int | None = None) -> dict[int, list[str]]:
        """Return the texts of each row by its number; rows without a usable text are skipped.

        Args:
            what: the column.
            column: name of a text in messages, such as "caption".
            most: largest number of texts of a row; any number if None.
        """
        by_row = {}
        for number in self.good:
            try:
                normalised = self._normalise.texts(column, {column: as_list(self.columns[what][number])})
                texts = [normalised] if isinstance(normalised, str) else normalised
                if most is not None and len(texts) > most:
                    raise RowError(f"a list as {column}", f"{len(texts)} texts instead of one")
            except RowError as error:
                self.skipped[number] = error
            else:
                by_row[number] = texts
        return by_row

    def numbers(self, what: str, column: str) -> dict[int, float]:
        """Return the number of each row by the row's number; rows without a finite one are skipped.

        Args:
            what: the column.
            column: name of a number in messages, such as "score".
        """
        by_row = {}
        for number in self.good:
            value = self.columns[what][number]
            try:
                by_row[number] = float(value)
                if not np.isfinite(by_row[number]):
                    raise ValueError
            except (TypeError, ValueError):
                self.skipped[number] = RowError(f"no {column}", f"{value!r:.100} is not a number")
        return {number: value for number, value in by_row.items() if number not in self.skipped}

    def images(self, encoder: Encoder) -> tuple[dict[int, np.ndarray], dict[int, str]]:
        """Embed the images of the good rows in batches; rows whose image cannot be read are skipped.

        Every image is decoded by the same code for every model, so that all models are measured on the same rows.

        Returns:
            The unit vector of each row by its number, and a digest that images of equal pixels share.
        """
        images = self.columns["images"]
        good = self.good
        notes: dict[int, str | RowError] = {}  # by the position in `good`, as vectors

        def stored(positions: Iterable[int]) -> Iterator[Any]:
            return (_stored(images, good[position]) for position in positions)

        def embed(part: slice) -> dict[int, np.ndarray]:
            vectors = {}
            positions = range(part.start, part.stop)
            with closing(encoder.images_ahead(stored(positions), _read)) as embedded:
                for position, (note, vector) in zip(positions, embedded, strict=True):
                    notes[position] = note
                    if vector is not None:
                        vectors[position] = vector
            return vectors

        everything = range(len(good))
        cached = encoder.cached_images(map(_content, stored(everything)), len(good), embed)
        vectors = embed(slice(0, len(good))) if cached is None else _finite(cached)
        rest = [position for position in everything if position not in notes]
        with closing(encoder.notes_ahead(stored(rest), _digest)) as read:
            notes |= zip(rest, read, strict=True)
        digests: dict[int, str] = {}
        for position, note in sorted(notes.items()):
            if isinstance(note, RowError):
                self.skipped[good[position]] = note
                continue
            digests[good[position]] = note
            if position not in vectors:  # it could not be read when the others were cached
                vectors |= embed(slice(position, position + 1))
        return {good[position]: vector for position, vector in vectors.items() if good[position] in digests}, digests

    def require_some(self) -> None:
        """Log a warning about skipped rows with their number and some names.

        Raises:
            EvaluationError: if all rows are skipped.
        """
        if not self.skipped:
            return
        causes = summary(Counter(error.cause for error in self.skipped.values()))
        skips = self.skips
        named = "; ".join(f"{skip.row}: {skip.cause}, {skip.detail:.150}".rstrip(",. ") for skip in skips[:_NAMED])
        if len(skips) == self.count:
            raise EvaluationError(f"None of the {self.count:,} rows of '{self.task}' can be used ({causes}): {named}.")
        more = ", ..." if len(skips) > _NAMED else ""
        if self.warn:  # once, however often a callback evaluates
            logger.warning_once(
                f"'{self.task}': {len(skips):,} of {self.count:,} rows are skipped ({causes}): {named}{more}."
            )


def _stored(images: Any, number: int) -> Any:
    """Return an image of a column, or the error of reading it: a decoding column raises whatever Pillow does."""
    try:
        return images[number]
    except Exception as error:
        return error


def _read(preparer: ImagePreparer, value: Any) -> tuple[str | RowError, Any]:
    """Return an image's digest and what is embedded of it; an error and None if it cannot be read."""
    decoded = _decode(preparer, value)
    if isinstance(decoded, RowError):
        return decoded, None
    return image_digest(decoded.image), preparer.prepare(decoded)


def _digest(preparer: ImagePreparer, value: Any) -> str | RowError:
    """Return an image's digest; an error if it cannot be read."""
    decoded = _decode(preparer, value)
    return decoded if isinstance(decoded, RowError) else image_digest(decoded.image)


def _decode(preparer: ImagePreparer, value: Any) -> DecodedImage | RowError:
    try:
        if isinstance(value, Exception):
            raise value
        return preparer.decode(image_source(value))
    except Exception as error:
        return error if isinstance(error, RowError) else image_row_error(error)


def _content(value: Any) -> str | None:
    """Return a hash of an image's bytes, or what is wrong with it; None if its bytes are elsewhere."""
    try:
        source = image_source(value)
        if isinstance(source, str | Path):
            path = os.path.expanduser(source)
            if not os.path.isfile(path):
                return None if "://" in str(source)[:_LONGEST_SCHEME] else f"text {source}"  # base64, or no such file
            source = path
        if isinstance(source, str | bytes):
            return Item("", image=source).key()
    except (RowError, ItemError) as error:
        return f"error {error}"
    return f"error {source}" if isinstance(source, Exception) else None


def _finite(vectors: np.ndarray) -> dict[int, np.ndarray]:
    """Return the vectors of rows that have one, by row."""
    return {row: np.array(vector) for row, vector in enumerate(vectors) if len(vector) and np.isfinite(vector).all()}


def image_digest(image: Image.Image) -> str:
    """Return a digest that images of equal pixels share."""
    return hashlib.blake2b(f"{image.mode} {image.size}".encode() + image.tobytes(), digest_size=16).hexdigest()


def image_source(value: Any) -> Any:
    """Return what `load_image` reads: the bytes or path of an undecoded `datasets.Image`, or the value itself.

    Raises:
        RowError: if there is no image.
    """
    if value is None:
        raise RowError("no image", "None")
    if isinstance(value, Mapping):
        value = value.get("bytes") if value.get("bytes") is not None else value.get("path")
        if value is None:
            raise RowError("no image", "neither bytes nor a path")
    return value
