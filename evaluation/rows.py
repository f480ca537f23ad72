"""Rows of an evaluation: those that cannot be used are skipped, counted and named, as the readers of files do it."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image
from transformers.utils import logging

from bifocal.data.images import fault_of
from bifocal.data.normalize import Normaliser
from bifocal.data.skips import Fault, Skip, summary
from bifocal.errors import EvaluationError
from bifocal.evaluation.encoders import Encoder
from bifocal.modeling import load_image

logger = logging.get_logger(__name__)
_NAMED = 3  # skipped rows that a warning names


def several(task: str, what: str, values: Any) -> Any:
    """Return several values, one of each row, as something with a length whose items can be read one by one.

    Raises:
        EvaluationError: if a single string, a mapping or a single image is given in the place of several.
    """
    if isinstance(values, str | bytes | Mapping | Image.Image):
        kind = "dictionary" if isinstance(values, Mapping) else type(values).__name__
        raise EvaluationError(f"The {what} of '{task}' are a single {kind}; give a list, one item for each row.")
    if hasattr(values, "__len__") and hasattr(values, "__getitem__"):
        return values
    if isinstance(values, Iterable):
        return list(values)
    raise EvaluationError(f"The {what} of '{task}' are a {type(values).__name__}; give a list, one item for each row.")


class Chosen(Sequence):
    """Some items of a sequence, read when they are asked for."""

    def __init__(self, items: Any, numbers: Sequence[int]) -> None:
        self.items, self.numbers = items, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, number: Any) -> Any:
        return self.items[self.numbers[number]]


class Rows:
    """The rows of one data set, of which some turn out to be unusable.

    Args:
        task: name of the data set, for messages.
        names: of the rows; their numbers when None.
        warn: whether to warn of skipped rows; who names the rows accounts for them when None.
        columns: what each row has, by what it is called; all of one length.

    Attributes:
        skipped: why, by number of the row.

    Raises:
        EvaluationError: if columns differ in length or there is no row.
    """

    def __init__(self, task: str, names: Sequence[str] | None = None, warn: bool | None = None, **columns: Any) -> None:
        self.task, self.names = task, names
        self.warn = names is None if warn is None else warn
        self.columns = {what: several(task, what, values) for what, values in columns.items()}
        lengths = {what: len(values) for what, values in self.columns.items()}
        if len(set(lengths.values())) > 1:
            said = " and ".join(f"{count:,} {what}" for what, count in lengths.items())
            raise EvaluationError(f"'{task}' has {said}; give equally many, one of each for a row.")
        self.count = next(iter(lengths.values()))
        self.skipped: dict[int, Fault] = {}
        self._normalise = Normaliser("image-text")
        if not self.count:
            raise EvaluationError(f"'{task}' has no rows; look at where its {next(iter(lengths))} come from.")

    @property
    def good(self) -> list[int]:
        """Numbers of the rows that can be used as far as is known."""
        return [number for number in range(self.count) if number not in self.skipped]

    @property
    def skips(self) -> list[Skip]:
        """The skipped rows with their names."""
        return [Skip.of(self.name(number), self.skipped[number]) for number in sorted(self.skipped)]

    def name(self, number: int) -> str:
        return str(self.names[number]) if self.names is not None else f"{self.task}:{number}"

    def texts(self, what: str, column: str, most: int | None = None) -> dict[int, list[str]]:
        """Return the texts of each row by its number; rows without a usable text are skipped.

        Args:
            what: the column given.
            column: what a text is called in a cause, such as "caption".
            most: texts that a row may have; any number when None.
        """
        found = {}
        for number in self.good:
            try:
                value: Any = self.columns[what][number]
                if not isinstance(value, str) and isinstance(value, Sequence | np.ndarray):
                    value = list(value)
                checked = self._normalise.texts(column, {column: value})
                texts = [checked] if isinstance(checked, str) else checked
                if most is not None and len(texts) > most:
                    raise Fault(f"a list as {column}", f"{len(texts)} texts in the place of one")
            except Fault as fault:
                self.skipped[number] = fault
            else:
                found[number] = texts
        return found

    def numbers(self, what: str, column: str) -> dict[int, float]:
        """Return a finite number of each row; rows without one are skipped."""
        found = {}
        for number in self.good:
            value = self.columns[what][number]
            try:
                found[number] = float(value)
                if not np.isfinite(found[number]):
                    raise ValueError
            except (TypeError, ValueError):
                self.skipped[number] = Fault(f"no {column}", f"{value!r:.100} is no number")
        return {number: value for number, value in found.items() if number not in self.skipped}

    def images(self, encoder: Encoder) -> tuple[dict[int, np.ndarray], dict[int, str]]:
        """Embed the images of the good rows in batches; rows whose image cannot be read are skipped.

        Every image is decoded once, by the same code for every model, so that all models are measured on the same rows.

        Returns:
            By number of the row its unit vector, and a digest that images of equal pixels share.
        """
        images = self.columns["images"]
        vectors: dict[int, np.ndarray] = {}
        digests: dict[int, str] = {}
        batch: dict[int, Image.Image] = {}

        def embed() -> None:
            if batch:
                vectors.update(zip(batch, encoder.images(list(batch.values())), strict=True))
                batch.clear()

        for number in self.good:
            try:
                image = load_image(image_source(images[number]))
            except Exception as error:  # a decoded column of `datasets` raises whatever Pillow does
                self.skipped[number] = error if isinstance(error, Fault) else fault_of(error)
                continue
            digests[number] = image_digest(image)
            batch[number] = image
            if len(batch) == encoder.batch_size:
                embed()
        embed()
        return vectors, digests

    def require_some(self) -> None:
        """Warn of skipped rows, with their number and some names.

        Raises:
            EvaluationError: if all rows are skipped.
        """
        if not self.skipped:
            return
        causes = summary(Counter(fault.cause for fault in self.skipped.values()))
        skips = self.skips
        named = "; ".join(f"{skip.row}: {skip.cause}, {skip.detail:.150}".rstrip(",. ") for skip in skips[:_NAMED])
        if len(skips) == self.count:
            raise EvaluationError(f"None of the {self.count:,} rows of '{self.task}' can be used ({causes}): {named}.")
        more = ", ..." if len(skips) > _NAMED else ""
        if self.warn:  # once, however often a callback evaluates
            logger.warning_once(
                f"'{self.task}': {len(skips):,} of {self.count:,} rows are skipped ({causes}): {named}{more}."
            )


def image_digest(image: Image.Image) -> str:
    """Return what images of equal pixels share."""
    return hashlib.blake2b(f"{image.mode} {image.size}".encode() + image.tobytes(), digest_size=16).hexdigest()


def image_source(value: Any) -> Any:
    """Return what `load_image` reads of an undecoded `datasets.Image`; any other value as it is."""
    if value is None:
        raise Fault("no image", "None")
    if isinstance(value, Mapping):
        value = value.get("bytes") if value.get("bytes") is not None else value.get("path")
        if value is None:
            raise Fault("no image", "neither bytes nor a path")
    return value
