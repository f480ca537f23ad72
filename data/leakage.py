"""Find rows of training data that are in an evaluation set: the same image or text, or a near-duplicate."""

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from bifocal.data.filters import Cleaning, comparable_text, read_image_bytes
from bifocal.data.loading import infer_kind, iter_rows
from bifocal.data.near_duplicates import (
    IMAGE_DISTANCE,
    TEXT_COLUMNS,
    TEXT_SIMILARITY,
    Signatures,
    rows_of,
    sign_image,
    sign_texts,
    similar_images,
    similar_texts,
)
from bifocal.data.row_names import row_name, select_rows
from bifocal.data.skips import RowError, SkipLog, SkippedRow
from bifocal.data.source import Source
from bifocal.errors import DataError
from bifocal.files import overwrite

LEAKS = "list of leaks"  # kind of the file
_PEEKED = 20  # rows read to infer their kind


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
    first = dict(reversed(near.tolist()))
    for row in sorted(exact.keys() | first.keys()):
        yield row, exact.get(row, first.get(row, -1)), row in exact


def compare_sources(train: Source, evaluation: Source, kinds: tuple[str | None, str | None] = (None, None),
                    max_distance: int = IMAGE_DISTANCE, min_similarity: float = TEXT_SIMILARITY) -> "Leakage":  # fmt: skip
    """Return which rows of a training source are in an evaluation source.

    Args:
        kinds: kinds of the rows of both; None infers them.
        max_distance, min_similarity: as for `find_leaks`.

    Raises:
        DataError: if a source cannot be read, or nothing of the two can be compared.
    """
    contents = []
    for source, kind in zip((train, evaluation), kinds):
        try:
            contents.append(read_content(iter_rows(source, kind or compared_kind(source))))
        except DataError as error:
            raise DataError(f"'{source.title}': {error}") from error
    ours, theirs = contents
    if not (ours.digests and theirs.digests) and not (ours.written and theirs.written):
        raise DataError("One source has only images, the other only texts. Nothing of them can be compared.")
    leaks = find_leaks(ours, theirs, max_distance, min_similarity)
    return Leakage(train.title, evaluation.title, ours.rows, theirs.rows, ours.skipped, theirs.skipped,
                   decided_by(ours, theirs), leaks)  # fmt: skip


@dataclass
class Leakage:
    """The leaks between two sources.

    Args:
        train, evaluation: titles of the sources.
        train_rows, evaluation_rows: numbers of rows compared.
        train_skipped, evaluation_skipped: numbers of rows that could not be read.
        decided_by: "image" or "text": what makes a row a leaked one.
        leaks: every leak.
    """

    train: str
    evaluation: str
    train_rows: int
    evaluation_rows: int
    train_skipped: int
    evaluation_skipped: int
    decided_by: str
    leaks: list[Leak]

    def leaked_rows(self) -> list[str]:
        """Return the names of the training rows that are in the evaluation set."""
        return list(dict.fromkeys(leak.train for leak in self.leaks if leak.match == self.decided_by))

    def summary(self) -> str:
        """Return the counts as lines of text."""
        counts: Counter[tuple[str, bool]] = Counter()
        rows: defaultdict[str, set[str]] = defaultdict(set)
        for leak in self.leaks:
            counts[leak.match, leak.exact] += 1
            rows[leak.match].add(leak.train)
        leaked = len(self.leaked_rows())
        lines = [f"{leaked:,} of {self.train_rows:,} rows ({leaked / self.train_rows:.2%}) are in {self.evaluation}, "
                 f"by their {self.decided_by}."]  # fmt: skip
        for match in ("image", "text"):
            if rows[match]:
                note = "" if match == self.decided_by else "; short captions match by chance, so the image decides"
                lines.append(f"{match}s: {counts[match, True]:,} equal, {counts[match, False]:,} near-duplicates, in "
                             f"{len(rows[match]):,} rows{note}")  # fmt: skip
        if self.train_skipped or self.evaluation_skipped:
            lines.append(f"not compared, since they cannot be read: {self.train_skipped:,} rows of {self.train}, "
                         f"{self.evaluation_skipped:,} of {self.evaluation}")  # fmt: skip
        return "\n".join(lines)


def write_leaks(leakage: Leakage, path: Path) -> None:
    """Write every leak as a line of JSON.

    Raises:
        NotOursError: if the path has another file.
        OSError: if it cannot be written.
    """
    with overwrite(path, LEAKS) as scratch, scratch.open("w", encoding="utf-8", errors="backslashreplace") as file:
        file.writelines(json.dumps(asdict(leak), ensure_ascii=False) + "\n" for leak in leakage.leaks)


def decided_by(train: Content, evaluation: Content) -> str:
    """Return "image" if both have images, or else "text"."""
    return "image" if train.digests and evaluation.digests else "text"


def compared_kind(source: Source) -> str:
    """Return the kind of rows that a source is read as: labels of images and scores of texts are not compared.

    Raises:
        DataError: if its columns fit no kind.
    """
    try:
        return infer_kind(source)
    except DataError:
        for kind in ("image-only", "scored-pair"):
            try:
                rows = list(islice(iter_rows(source, kind), _PEEKED))
            except DataError:
                continue
            if not all(isinstance(row, RowError) for _, row in rows):
                return kind
        raise


def filter_leaks(dataset: Any, cleaning: Cleaning, skipped: SkipLog, name: str) -> Any:
    """Return the rows of a `datasets.Dataset` that are not in the sources of `exclude_rows_of`; the others are logged.

    Raises:
        DataError: if a source cannot be read, or nothing of it can be compared.
    """
    train = read_content(rows_of(dataset))
    if train.skipped:
        raise DataError(f"'{name}' has images that cannot be read. Add clean.verify_images=true to skip such rows.")
    skips: dict[str, SkippedRow] = {}
    for about in cleaning.exclude_rows_of:
        source = Source(path=about) if isinstance(about, str) else Source(**about)
        evaluation = read_content(iter_rows(source, compared_kind(source)))
        deciding = decided_by(train, evaluation)
        if not (train.written and evaluation.written) and deciding == "text":
            raise DataError(f"'{name}' has nothing to compare with '{source.title}'. Correct exclude_rows_of.")
        most = IMAGE_DISTANCE if cleaning.near_duplicate_images is None else cleaning.near_duplicate_images
        for leak in find_leaks(train, evaluation, most, cleaning.near_duplicate_texts or TEXT_SIMILARITY):
            if leak.match == deciding and leak.train not in skips:
                detail = f"{leak.match} of {leak.evaluation} in {source.title}"
                skips[leak.train] = SkippedRow(leak.train, f"{leak.match} of an excluded source", detail, filtered=True)
    skipped.add(name, 0, skips.values())
    kept = [number for number in range(len(dataset)) if row_name(dataset, number) not in skips]
    return select_rows(dataset, kept) if skips else dataset
