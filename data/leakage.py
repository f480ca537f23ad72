"""Find rows of training data that are in an evaluation set: the same image or text, or a near-duplicate."""

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from bifocal.data.filters import Cleaning, comparable_text, read_image_bytes
from bifocal.data.near_duplicates import (
    IMAGE_DISTANCE,
    TEXT_COLUMNS,
    TEXT_SIMILARITY,
    Signatures,
    cache_path,
    rows_of,
    sign_image,
    sign_texts,
    similar_images,
    similar_texts,
)
from bifocal.data.row_names import row_name, select_rows
from bifocal.data.skips import RowError, SkipLog, SkippedRow
from bifocal.errors import DataError
from bifocal.files import replace_file

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Leak:
    """An image or text of a training row that is in the evaluation set.

    Args:
        train, evaluation: names of the rows.
        match: "image" or "text".
        exact: whether the bytes of the images, or the texts without case and spaces, are equal.
        train_text, evaluation_text: the texts, if they match.
    """

    train: str
    evaluation: str
    match: str
    exact: bool
    train_text: str = ""
    evaluation_text: str = ""


@dataclass
class Content:
    """What is compared of the rows of a source: each image and each text, captions and negatives of a row included.

    Args:
        rows: number of good rows.
        skipped: number of rows that could not be read.
        images, texts: signatures, each with the name of its row.
        digests: digests of the images' bytes.
        written: the texts.
    """

    rows: int
    skipped: int
    images: Signatures
    texts: Signatures
    digests: list[bytes]
    written: list[str]


def read_content(rows: Iterable[tuple[str, dict[str, Any] | RowError]]) -> Content:
    """Return what is compared of rows.

    Raises:
        DataError: if ImageHash or datasketch is not installed, or no row can be used.
    """
    good = skipped = 0
    image_names: list[str] = []
    signed: list[tuple[np.ndarray, np.ndarray, bool]] = []
    digests: list[bytes] = []
    text_names: list[str] = []
    written: list[str] = []
    for name, row in rows:
        try:
            if isinstance(row, RowError):
                raise row
            if "image" in row:
                data = read_image_bytes(row["image"])
                signed.append(sign_image(data))
                image_names.append(name)
                digests.append(hashlib.blake2b(data, digest_size=16).digest())
        except RowError:
            skipped += 1
            continue
        good += 1
        texts = [row[column] for column in (*TEXT_COLUMNS, "negatives") if column in row]
        for text in dict.fromkeys(text for value in texts for text in (value if isinstance(value, list) else [value])):
            text_names.append(name)
            written.append(text)
    if not good:
        raise DataError("No row can be compared. See `bifocal data inspect` for the causes.")
    images = Signatures.of_images(image_names, signed)
    texts_signed = sign_texts([comparable_text(text) for text in written])
    return Content(good, skipped, images, Signatures(text_names, texts={"text": texts_signed}), digests, written)


def find_leaks(
    train: Content, evaluation: Content, max_distance: int = IMAGE_DISTANCE, min_similarity: float = TEXT_SIMILARITY
) -> list[Leak]:
    """Return the images and texts of the training rows that are in the evaluation set, each with one partner.

    Args:
        max_distance, min_similarity: as for `similar_images` and `similar_texts`.
    """
    leaks = []
    theirs: dict[Any, int] = {}
    for number, digest in enumerate(evaluation.digests):
        theirs.setdefault(digest, number)
    partners = {row: theirs[digest] for row, digest in enumerate(train.digests) if digest in theirs}
    near = similar_images(train.images, max_distance, evaluation.images)
    for row, partner, exact in _partners(partners, near):
        leaks.append(Leak(train.images.names[row], evaluation.images.names[partner], "image", exact))
    theirs = {}
    for number, text in enumerate(evaluation.written):
        theirs.setdefault(comparable_text(text), number)
    keys = map(comparable_text, train.written)
    partners = {row: theirs[key] for row, key in enumerate(keys) if key in theirs}
    near = similar_texts(train.texts, min_similarity, evaluation.texts)
    for row, partner, exact in _partners(partners, near):
        names = train.texts.names[row], evaluation.texts.names[partner]
        leaks.append(Leak(*names, "text", exact, train.written[row], evaluation.written[partner]))
    return leaks


def _partners(exact: dict[int, int], near: np.ndarray) -> Iterator[tuple[int, int, bool]]:
    first: dict[int, int] = dict(reversed(near.tolist()))
    for row in sorted(exact.keys() | first.keys()):
        yield row, exact[row] if row in exact else first[row], row in exact


def decided_by(train: Content, evaluation: Content) -> str:
    """Return "image" if both have images, or else "text"."""
    return "image" if train.digests and evaluation.digests else "text"


def filter_leaks(
    dataset: Any, cleaning: Cleaning, evaluations: Iterable[tuple[str, Content]], skipped: SkipLog, name: str
) -> Any:
    """Return the rows of a `datasets.Dataset` that are not in the sources of `exclude_rows_of`; the others are logged.

    Which ones they are is cached next to the data set's cache, until it or the content of a source changes.

    Args:
        evaluations: titles and contents of these sources.

    Raises:
        DataError: if nothing of a source can be compared.
    """
    evaluations = list(evaluations)
    for title, evaluation in evaluations:
        if evaluation.skipped:
            logger.warning(f"{evaluation.skipped:,} rows of '{title}' cannot be read, so they exclude nothing.")
    compared = [(title, e.images.names, e.digests, e.texts.names, e.written) for title, e in evaluations]
    path = cache_path(dataset, "leaks", [cleaning.near_duplicate_images, cleaning.near_duplicate_texts, compared])
    if path is not None and path.exists():
        skips = {row: SkippedRow(row, *rest) for row, *rest in json.loads(path.read_text())}
    else:
        skips = _leaked(dataset, cleaning, evaluations, name)
        if path is not None:
            with replace_file(path) as scratch:
                scratch.write_text(json.dumps(list(skips.values())))
    skipped.add(name, 0, skips.values())
    kept = [number for number in range(len(dataset)) if row_name(dataset, number) not in skips]
    return select_rows(dataset, kept) if skips else dataset


def _leaked(
    dataset: Any, cleaning: Cleaning, evaluations: list[tuple[str, Content]], name: str
) -> dict[str, SkippedRow]:
    """Return the rows to skip, by name."""
    train = read_content(rows_of(dataset))
    if train.skipped:
        raise DataError(f"'{name}' has images that cannot be read. Add clean.verify_images=true to skip such rows.")
    skips: dict[str, SkippedRow] = {}
    for title, evaluation in evaluations:
        deciding = decided_by(train, evaluation)
        if not (train.written and evaluation.written) and deciding == "text":
            raise DataError(f"'{name}' has nothing to compare with '{title}'. Correct exclude_rows_of.")
        most = IMAGE_DISTANCE if cleaning.near_duplicate_images is None else cleaning.near_duplicate_images
        for leak in find_leaks(train, evaluation, most, cleaning.near_duplicate_texts or TEXT_SIMILARITY):
            if leak.match == deciding and leak.train not in skips:
                detail = f"{leak.match} of {leak.evaluation} in {title}"
                skips[leak.train] = SkippedRow(leak.train, f"{leak.match} of an excluded source", detail, filtered=True)
    return skips
