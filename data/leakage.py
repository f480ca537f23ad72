"""Find rows of training data that are in an evaluation set: the same image or text, or a near-duplicate."""

import json
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bifocal.data.filters import Cleaning, comparable_text
from bifocal.data.near_duplicates import IMAGE_DISTANCE, TEXT_SIMILARITY, cache_path, similar_images, similar_texts
from bifocal.data.row_names import row_name, rows_of, select_rows
from bifocal.data.signatures import TEXT_COLUMNS, Signatures, SignedImage, digest_of, sign_image, sign_texts
from bifocal.data.skips import RowError, SkipLog, SkippedRow
from bifocal.errors import DataError
from bifocal.files import replace_file

_TEXTS = (*TEXT_COLUMNS, "negatives")


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

    def fingerprint(self) -> str:
        """Return a digest of what is compared, and of the rows' names."""
        facts = repr((self.images.names, self.digests, self.texts.names, self.written))
        return digest_of(facts.encode("utf-8", "surrogatepass")).hex()


Evaluations = Sequence[tuple[str, Content]]  # titles and contents of the sources of `exclude_rows_of`


def read_content(
    rows: Iterable[tuple[str, dict[str, Any] | RowError]], images: bool = True, texts: bool = True
) -> Content:
    """Return what is compared of rows.

    Args:
        rows: names and rows, whose images are bytes, paths, or signed ones.
        images, texts: whether the images and the texts are compared.

    Raises:
        DataError: if ImageHash or datasketch is not installed, or no row can be used.
    """
    good = skipped = 0
    image_names: list[str] = []
    signed: list[SignedImage] = []
    text_names: list[str] = []
    written: list[str] = []
    for name, row in rows:
        try:
            if isinstance(row, RowError):
                raise row
            if images and "image" in row:
                signed.append(sign_image(row["image"]))
                image_names.append(name)
        except RowError:
            skipped += 1
            continue
        good += 1
        values = [row[column] for column in _TEXTS if texts and column in row]
        for text in dict.fromkeys(text for value in values for text in (value if isinstance(value, list) else [value])):
            text_names.append(name)
            written.append(text)
    if not good:
        raise DataError("No row can be compared. See `bifocal data inspect` for the causes.")
    text_signatures = Signatures(text_names, texts={"text": sign_texts([comparable_text(text) for text in written])})
    digests = [image.digest for image in signed]
    return Content(good, skipped, Signatures.of_images(image_names, signed), text_signatures, digests, written)


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


def filter_leaks(dataset: Any, cleaning: Cleaning, evaluations: Evaluations, skipped: SkipLog, name: str) -> Any:
    """Return the rows of a `datasets.Dataset` that are not in the sources of `exclude_rows_of`; the others are logged.

    Which ones they are is cached next to the data set's cache, until it or the content of a source changes.

    Raises:
        DataError: if nothing of a source can be compared, or an image cannot be read.
    """
    matches = deciding_matches(dataset.column_names, evaluations, name)
    compared = [(title, evaluation.fingerprint()) for title, evaluation in evaluations]
    path = cache_path(dataset, "leaks", [cleaning.near_duplicate_images, cleaning.near_duplicate_texts, compared])
    if path is not None and path.exists():
        leaked = {number: (cause, detail) for number, cause, detail in json.loads(path.read_text())}
    else:
        leaked = leaked_rows((row for _, row in rows_of(dataset)), cleaning, evaluations, matches, name)
        if path is not None:
            with replace_file(path) as scratch:
                scratch.write_text(json.dumps([(number, *reason) for number, reason in leaked.items()]))
    skips = [SkippedRow(row_name(dataset, number), *reason, filtered=True) for number, reason in leaked.items()]
    skipped.add(name, 0, skips)
    kept = [number for number in range(len(dataset)) if number not in leaked]
    return select_rows(dataset, kept) if skips else dataset


def deciding_matches(columns: Collection[str], evaluations: Evaluations, name: str) -> list[str]:
    """Return for each source of `exclude_rows_of` whether rows with these columns are compared by "image" or "text".

    Raises:
        DataError: if nothing can be compared.
    """
    matches = []
    for title, evaluation in evaluations:
        matches.append("image" if "image" in columns and evaluation.digests else "text")
        if matches[-1] == "text" and not (evaluation.written and any(column in columns for column in _TEXTS)):
            raise DataError(f"'{name}' has nothing to compare with '{title}'. Correct exclude_rows_of.")
    return matches


def leaked_rows(
    rows: Iterable[dict[str, Any]], cleaning: Cleaning, evaluations: Evaluations, matches: list[str], name: str
) -> dict[int, tuple[str, str]]:
    """Return the rows that are in the sources of `exclude_rows_of`, in order: number, cause and detail.

    Args:
        matches: as returned by `deciding_matches`.
        name: name of the source, for messages.

    Raises:
        DataError: if an image cannot be read.
    """
    numbered = ((str(number), row) for number, row in enumerate(rows))
    train = read_content(numbered, images="image" in matches, texts="text" in matches)
    if train.skipped:
        raise DataError(f"'{name}' has images that cannot be read. Add clean.verify_images=true to skip such rows.")
    most = IMAGE_DISTANCE if cleaning.near_duplicate_images is None else cleaning.near_duplicate_images
    leaked: dict[int, tuple[str, str]] = {}
    for (title, evaluation), match in zip(evaluations, matches, strict=True):
        for leak in find_leaks(train, evaluation, most, cleaning.near_duplicate_texts or TEXT_SIMILARITY):
            if leak.match == match:
                reason = f"{match} of an excluded source", f"{match} of {leak.evaluation} in {title}"
                leaked.setdefault(int(leak.train), reason)
    return dict(sorted(leaked.items()))
