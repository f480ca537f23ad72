"""Find near-duplicate images and texts among the rows of a source, by their signatures, and remove them."""

import json
import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from bifocal.data.filters import Cleaning
from bifocal.data.image_decoding import image_paths
from bifocal.data.row_names import row_name, rows_of, select_rows
from bifocal.data.signatures import Signatures, not_installed, sign_rows
from bifocal.data.similar_pairs import (
    BLOCK,
    SEARCHED,
    HashIndex,
    band_keys,
    band_shape,
    equal_images,
    equal_texts,
    first_texts,
    same_colours,
)
from bifocal.data.skips import RowError, SkipLog, SkippedRow
from bifocal.errors import DataError
from bifocal.files import replace_file

# Defaults, measured in docs/data.md.
IMAGE_DISTANCE = 8  # bits of 64
TEXT_SIMILARITY = 0.8

_VERSION = 2  # of the cached rows; raise it when others are found


def require_libraries(cleaning: Cleaning) -> None:
    """Require the libraries that find near-duplicates, before many rows are read.

    Raises:
        DataError: if one is not installed.
    """
    libraries = []
    if cleaning.near_duplicate_images is not None:
        libraries += [("images", "imagehash", "ImageHash"), ("images", "faiss", "faiss-cpu")]
    if cleaning.near_duplicate_texts is not None:
        libraries += [("texts", "datasketch", "datasketch")]
    for what, module, package in libraries:
        if find_spec(module) is None:
            raise not_installed(what, package)


def near_duplicate_images(rows: Signatures, max_distance: int) -> dict[int, int]:
    """Return the rows to skip, each with the row that stays in its place.

    A row is skipped only if an earlier row that stays is a near-duplicate of it, so that a chain of rows, each similar
    to the next, does not make one group of different rows. Rows are compared with those that stay, so that neither
    time nor memory grows with the square of the rows where most are alike.
    """
    groups = equal_images(rows)
    if not groups:
        return {}
    assert rows.hashes is not None
    assert rows.colours is not None
    first = np.array([group[0] for group in groups], np.int64)
    return _with_equal_rows(_similar_images_to_skip(rows.hashes[first], rows.colours[first], max_distance), groups)


def _similar_images_to_skip(hashes: np.ndarray, colours: np.ndarray, max_distance: int) -> dict[int, int]:
    index = HashIndex(len(hashes), max_distance)
    indexed = np.empty(len(hashes), np.int64)  # numbers of the images that stay
    count = 0
    skipped: dict[int, int] = {}
    for start in range(0, len(hashes), SEARCHED):
        block = np.arange(start, min(start + SEARCHED, len(hashes)))
        near = index.pairs(hashes[block])
        near = np.stack([block[near[:, 0]], indexed[near[:, 1]]], axis=1)
        near = near[same_colours(colours, near)]
        near = near[np.lexsort((near[:, 1], near[:, 0]))]
        laters, of_later = np.unique(near[:, 0], return_index=True)
        skipped |= dict(zip(laters.tolist(), near[of_later, 1].tolist()))
        block = np.setdiff1d(block, laters)
        signs = 1 - 2 * np.unpackbits(hashes[block], axis=1).astype(np.float32)
        distances = (signs.shape[1] - signs @ signs.T) / 2  # whole numbers, which float32 holds exactly
        near = block[np.argwhere(np.tril(distances <= max_distance, -1))]
        of_block = first_of_groups(near[same_colours(colours, near)])
        skipped |= of_block
        block = np.setdiff1d(block, list(of_block)).astype(np.int64)
        index.add(hashes[block])
        indexed[count : count + len(block)] = block
        count += len(block)
    return skipped


def near_duplicate_texts(rows: Signatures, min_similarity: float) -> dict[int, int]:
    """Return the rows to skip, each with the row that stays in its place, as `near_duplicate_images` does."""
    columns = list(rows.texts)
    groups = equal_texts(rows, columns) if columns else []
    if not groups:
        return {}
    return _with_equal_rows(_similar_texts_to_skip(first_texts(rows, columns, groups), min_similarity), groups)


def _similar_texts_to_skip(texts: np.ndarray, min_similarity: float) -> dict[int, int]:
    """Return the rows to skip; `texts` has the shape (rows, columns, 128)."""
    bands, width = band_shape(min_similarity, texts.shape[1])
    keys = np.empty((len(texts), bands), np.int32)
    for band in range(bands):
        of_band = band_keys(texts, band, width)
        keys[:, band] = np.where(np.bincount(of_band)[of_band] > 1, of_band, -1)  # -1: no other row has it
    staying: list[dict[int, list[int]]] = [{} for _ in range(bands)]  # rows by key, for each band
    skipped: dict[int, int] = {}
    for row in np.flatnonzero((keys >= 0).any(axis=1)).tolist():
        own = [(of_key, key) for of_key, key in zip(staying, keys[row].tolist()) if key >= 0]
        candidates = sorted({candidate for of_key, key in own for candidate in of_key.get(key, ())})
        for start in range(0, len(candidates), BLOCK):
            block = candidates[start : start + BLOCK]
            similar = ((texts[block] == texts[row]).mean(axis=2) >= min_similarity).all(axis=1)
            if similar.any():
                skipped[row] = block[int(similar.argmax())]
                break
        else:
            for of_key, key in own:
                of_key.setdefault(key, []).append(row)
    return skipped


def _with_equal_rows(skipped: dict[int, int], groups: Sequence[Sequence[int]]) -> dict[int, int]:
    """Return the rows to skip for the groups to skip, with all rows that equal an earlier one."""
    rows = {groups[later][0]: groups[earlier][0] for later, earlier in skipped.items()}
    for first, *later in groups:
        rows |= dict.fromkeys(later, rows.get(first, first))
    return rows


def first_of_groups(pairs: np.ndarray) -> dict[int, int]:
    """Return the rows to skip, each with the row that stays in its place.

    A row is skipped only if an earlier row that stays is a near-duplicate of it, so that a chain of rows, each similar
    to the next, does not make one group of different rows.

    Args:
        pairs: as returned by `similar_images`, the later row first, sorted.
    """
    skipped: dict[int, int] = {}
    is_skipped = np.zeros(int(pairs.max(initial=-1)) + 1, bool)
    laters, starts = np.unique(pairs[:, 0], return_index=True)
    for later, earlier in zip(laters.tolist(), np.split(pairs[:, 1], starts[1:]), strict=False):
        staying = np.flatnonzero(~is_skipped[earlier])
        if len(staying):
            skipped[later] = int(earlier[staying[0]])
            is_skipped[later] = True
    return skipped


def filter_near_duplicates(dataset: Any, cleaning: Cleaning, skipped: SkipLog, name: str) -> Any:
    """Return the rows of a `datasets.Dataset` that are no near-duplicates of earlier ones; the others are logged.

    Which ones they are is cached next to the data set's cache, until a file changes.

    Raises:
        DataError: if a library is not installed, or an image cannot be read.
    """
    rows = _cached_skips(dataset, cleaning, name)
    skips = [
        near_duplicate(row_name(dataset, later), row_name(dataset, earlier), by_text)
        for later, earlier, by_text in rows.tolist()
    ]
    skipped.add(name, 0, skips)
    return select_rows(dataset, np.setdiff1d(np.arange(len(dataset)), rows[:, 0]).tolist()) if skips else dataset


def near_duplicate(later: str, earlier: str, by_text: bool) -> SkippedRow:
    """Return a row that is skipped as the near-duplicate of an earlier one."""
    cause = f"near-duplicate {'text' if by_text else 'image'}"
    return SkippedRow(later, cause, f"near-duplicate of {earlier}", filtered=True)


def _cached_skips(dataset: Any, cleaning: Cleaning, name: str) -> np.ndarray:
    """Return `_skips`, from the cache if nothing has changed."""
    settings = [cleaning.near_duplicate_images, cleaning.near_duplicate_texts]
    path = cache_path(dataset, "near-duplicates", settings)
    if path is not None and path.exists():
        return np.array(json.loads(path.read_text()), np.int64).reshape(-1, 3)
    skips = _skips(dataset, cleaning, name)
    if path is not None:
        with replace_file(path) as scratch:
            scratch.write_text(json.dumps(skips.tolist()))
    return skips


def cache_path(dataset: Any, name: str, facts: Any) -> Path | None:
    """Return a file next to the cache of a data set, for what depends on its rows, their images, and other facts.

    Returns:
        None if the data set is not on disk, or the state of an image's file is unknown.
    """
    from datasets.fingerprint import Hasher

    files, stamps = dataset.cache_files, _image_stamps(dataset)
    if not files or stamps is None:
        return None
    key = Hasher.hash([_VERSION, dataset._fingerprint, facts, stamps])
    return Path(files[0]["filename"]).with_name(f"{name}-{key}.json")


def _image_stamps(dataset: Any) -> list[tuple[int, int]] | None:
    """Return the sizes and times of the images' files, of which a data set knows only the paths; None if unknown."""
    paths = image_paths(dataset, "image") if "image" in dataset.column_names else None
    try:
        files = [os.stat(path) for path in paths or [] if path is not None]
    except OSError:
        return None
    return [(file.st_size, file.st_mtime_ns) for file in files]


def _skips(dataset: Any, cleaning: Cleaning, name: str) -> np.ndarray:
    """Return `near_duplicate_rows` of a data set."""
    images, texts = cleaning.near_duplicate_images is not None, cleaning.near_duplicate_texts is not None
    try:
        signatures = sign_rows(rows_of(dataset), images, texts)
    except RowError as error:
        raise DataError(
            f"'{name}' has an image that cannot be read ({error}). Add clean.verify_images=true, which skips such rows."
        ) from error
    return near_duplicate_rows(signatures, len(dataset), cleaning)


def near_duplicate_rows(signatures: Signatures, count: int, cleaning: Cleaning) -> np.ndarray:
    """Return the rows to skip, sorted: number, that of the row that stays in its place, and 1 if the texts decided.

    Args:
        count: number of rows.
    """
    most, least = cleaning.near_duplicate_images, cleaning.near_duplicate_texts
    skips: dict[int, tuple[int, int]] = {}
    if most is not None:
        skips |= {row: (stays, 0) for row, stays in near_duplicate_images(signatures, most).items()}
    if least is not None:  # among the rows that stay
        kept = np.setdiff1d(np.arange(count), list(skips)).astype(np.int64)
        texts = signatures if not skips else Signatures([], texts={c: v[kept] for c, v in signatures.texts.items()})
        text_skips = near_duplicate_texts(texts, least).items()
        skips |= {int(kept[row]): (int(kept[stays]), 1) for row, stays in text_skips}
    return np.array([(row, *skips[row]) for row in sorted(skips)], np.int64).reshape(-1, 3)
