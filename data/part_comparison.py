"""Compare the rows of all parts of a source: duplicates, near-duplicates, and rows of excluded sources.

Each part is signed on its own, by whoever writes it: a record of fixed size for each row, and the rows that are in an
excluded source. The records of all parts tell which rows to skip; the rows themselves are not needed for that.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bifocal.data.filters import DUPLICATE_IMAGE, DUPLICATE_TEXT, Cleaning, comparable_texts
from bifocal.data.kinds import KINDS
from bifocal.data.leakage import Evaluations, deciding_matches, leaked_rows
from bifocal.data.near_duplicates import near_duplicate, near_duplicate_rows
from bifocal.data.signatures import (
    COLOURS,
    HASH_BYTES,
    PERMUTATIONS,
    TEXT_COLUMNS,
    Signatures,
    digest_of,
    sign_image,
    sign_rows,
)
from bifocal.data.skips import RowError, SkippedRow
from bifocal.errors import DataError

NAMES = "names.jsonl"  # of a part's rows, one on each line
SIGNATURES, LEAKS = "signatures.bin", "leaks.jsonl"  # files of a signed part
_BLOCK = 10_000  # rows signed at a time; their images are not held
_IMAGE, _TEXT = "image digest", "text digest"
_VERSION = 1  # of these files; raise it when they change


def signing_key(kind: str, cleaning: Cleaning, evaluations: Evaluations) -> str:
    """Return what the files of a signed part depend on, besides its rows."""
    excluded = [(title, content.fingerprint()) for title, content in evaluations]
    thresholds = [cleaning.near_duplicate_images, cleaning.near_duplicate_texts] if excluded else []
    return repr([_VERSION, _record(kind, cleaning).descr, excluded, thresholds])


def sign_part(
    rows: Iterable[dict[str, Any]], kind: str, cleaning: Cleaning, evaluations: Evaluations, name: str, folder: Path
) -> None:
    """Write the signatures of the rows of a part, and which of them are in an excluded source, into its folder.

    Args:
        rows: good rows, with images as bytes.
        cleaning: the filters that compare rows.
        name: name of the part, for messages.

    Raises:
        DataError: if a library is not installed, or an image cannot be compared.
        OSError: if the files cannot be written.
    """
    matches = deciding_matches(KINDS[kind], evaluations, name)
    signs_images = cleaning.near_duplicate_images is not None or "image" in matches
    record = _record(kind, cleaning)
    iterator = iter(rows)
    done = 0
    with (folder / SIGNATURES).open("wb") as signatures, (folder / LEAKS).open("w", encoding="utf-8") as leaks:
        while block := list(islice(_without_images(iterator, signs_images, name), _BLOCK)):
            records = _signed([row for _, row in block], [digest for digest, _ in block], record, cleaning)
            if evaluations:
                leaked = leaked_rows((row for _, row in block), cleaning, evaluations, matches, name)
                records["leaked"][list(leaked)] = True
                leaks.writelines(json.dumps([done + number, *reason]) + "\n" for number, reason in leaked.items())
            records.tofile(signatures)
            done += len(block)


def _without_images(
    rows: Iterator[dict[str, Any]], signs_images: bool, name: str
) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Yield the digest of each row's image, and the row with its signed image in the place of the image's bytes."""
    for row in rows:
        digest = b""
        if "image" in row and signs_images:
            try:
                row["image"] = sign_image(row["image"])
            except RowError as error:  # it can be decoded, though, or the row would be a bad one
                raise DataError(f"An image of '{name}' cannot be compared ({error}). Remove it.") from error
            digest = row["image"].digest
        elif "image" in row:
            digest = digest_of(row.pop("image"))
        yield digest, row


def _record(kind: str, cleaning: Cleaning) -> np.dtype:
    """Return what is kept of a row."""
    fields: list[tuple[Any, ...]] = [("leaked", "?")]
    if "image" in KINDS[kind]:
        if cleaning.deduplicate_images:
            fields.append((_IMAGE, "V16"))
        if cleaning.near_duplicate_images is not None:
            fields += [("hash", "u1", HASH_BYTES), ("colours", "u1", COLOURS), ("plain", "?")]
    if cleaning.deduplicate_texts:
        fields.append((_TEXT, "V16"))
    if cleaning.near_duplicate_texts is not None:
        fields += [(column, "<u4", PERMUTATIONS) for column in TEXT_COLUMNS if column in KINDS[kind]]
    return np.dtype(fields)


def _signed(rows: list[dict[str, Any]], digests: list[bytes], record: np.dtype, cleaning: Cleaning) -> np.ndarray:
    """Return the records of rows whose images are signed."""
    records = np.zeros(len(rows), record)
    names = record.names or ()
    images, texts = cleaning.near_duplicate_images is not None, cleaning.near_duplicate_texts is not None
    signatures = sign_rows((("", row) for row in rows), images, texts)
    values = {"hash": signatures.hashes, "colours": signatures.colours, "plain": signatures.plain, **signatures.texts}
    for field in values.keys() & set(names):
        records[field] = values[field]
    if _IMAGE in names:
        records[_IMAGE] = np.array(digests, "V16")
    if _TEXT in names:
        records[_TEXT] = np.array([digest_of(comparable_texts(row)) for row in rows], "V16")
    return records


class SkippedRows(NamedTuple):
    """Rows of all parts that are skipped.

    Args:
        skips: the rows, by filter and in order.
        numbers: for each part the numbers of its rows, sorted.
    """

    skips: list[SkippedRow]
    numbers: list[np.ndarray]


def compare_parts(folders: Sequence[Path], kind: str, cleaning: Cleaning) -> SkippedRows:
    """Return the rows of signed parts that the filters skip, the same ones as if all parts were one.

    Args:
        folders: folders of the parts, in the order of the source.
        cleaning: the filters that compare rows.

    Raises:
        DataError: if a library is not installed.
    """
    record = _record(kind, cleaning)
    parts = [_read(folder / SIGNATURES, record) for folder in folders]
    starts = np.concatenate([[0], np.cumsum([len(part) for part in parts])])
    kept = np.arange(starts[-1])

    def values(field: str) -> Any:
        """Return what the rows that stay have in a field; None if no filter needs it."""
        if field not in (record.names or ()):
            return None
        of_all = np.concatenate([part[field] for part in parts])
        return of_all if len(kept) == len(of_all) else of_all[kept]

    duplicates: dict[int, str] = {}
    for cause, digests in ((DUPLICATE_IMAGE, _IMAGE), (DUPLICATE_TEXT, _TEXT)):
        if (digest := values(digests)) is not None:
            is_later = np.ones(len(kept), bool)
            is_later[np.unique(digest, return_index=True)[1]] = False
            duplicates |= dict.fromkeys(kept[is_later].tolist(), cause)
            kept = kept[~is_later]
    texts = {column: of_column for column in TEXT_COLUMNS if (of_column := values(column)) is not None}
    signatures = Signatures([], values("hash"), values("colours"), values("plain"), texts)
    near = near_duplicate_rows(signatures, len(kept), cleaning)
    near[:, :2] = kept[near[:, :2]]
    skipped = duplicates.keys() | set(near[:, 0].tolist())
    leaked = {row: reason for row, reason in _leaks(folders, starts) if row not in skipped}
    skipped |= leaked.keys()
    names = _names(skipped | set(near[:, 1].tolist()), folders, starts)
    skips = [SkippedRow(names[row], cause, filtered=True) for row, cause in sorted(duplicates.items())]
    skips += [near_duplicate(names[later], names[earlier], by_text) for later, earlier, by_text in near.tolist()]
    skips += [SkippedRow(names[row], *reason, filtered=True) for row, reason in leaked.items()]
    numbers = np.array(sorted(skipped), np.int64)
    bounds = np.searchsorted(numbers, starts)
    return SkippedRows(skips, [part - start for part, start in zip(np.split(numbers, bounds[1:-1]), starts)])


def _read(path: Path, record: np.dtype) -> np.ndarray:
    """Return the records of a part, which stay on the disk."""
    return np.memmap(path, record, mode="r") if path.stat().st_size else np.empty(0, record)


def _leaks(folders: Sequence[Path], starts: np.ndarray) -> Iterator[tuple[int, tuple[str, str]]]:
    """Yield the rows that are in excluded sources, with cause and detail."""
    for folder, start in zip(folders, starts.tolist()):
        with (folder / LEAKS).open(encoding="utf-8") as file:
            for number, cause, detail in map(json.loads, file):
                yield start + number, (cause, detail)


def _names(rows: set[int], folders: Sequence[Path], starts: np.ndarray) -> dict[int, str]:
    """Return the names of some rows."""
    names: dict[int, str] = {}
    for folder, start in zip(folders, starts.tolist()):
        with (folder / NAMES).open(encoding="utf-8") as file:
            names.update({row: json.loads(line) for row, line in enumerate(file, start) if row in rows})
    return names
