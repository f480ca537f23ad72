"""Find near-duplicate images and texts among the rows of a source, by their signatures, and remove them."""

import json
import math
import os
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from bifocal.data.filters import Cleaning
from bifocal.data.image_decoding import image_paths
from bifocal.data.row_names import row_name, rows_of, select_rows
from bifocal.data.signatures import PERMUTATIONS, Signatures, digest_of, not_installed, sign_rows
from bifocal.data.skips import RowError, SkipLog, SkippedRow
from bifocal.errors import DataError
from bifocal.files import replace_file

# Defaults, measured in docs/data.md.
IMAGE_DISTANCE = 8  # bits of 64
TEXT_SIMILARITY = 0.8

_HASH_BITS = 64
_CANDIDATE = 12  # lookups in the time in which one hash is compared, measured
_COLOUR_DIFFERENCE = 32.0  # of 255, in any field, after the brightness is made equal
_BRIGHTNESS = 4 / 3  # largest ratio of brightness that is made equal
_MISSED = 0.01  # largest probability that a pair at the threshold is missed
_VERSION = 2  # of the cached rows; raise it when others are found
_BLOCK = 4096  # pairs compared at a time
_SEARCHED = 256  # hashes looked up at a time; each may have a pair with every earlier one


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


def similar_images(rows: Signatures, max_distance: int, others: Signatures | None = None) -> np.ndarray:
    """Return the pairs of near-duplicate images as rows (number, number), each once and sorted.

    All pairs of hashes within the distance are found; of these, images whose colours differ are not near-duplicates.

    Args:
        max_distance: number of bits, of 64, in which hashes may differ.
        others: rows to pair with; None pairs the rows with earlier ones of themselves, the later one first. Of images
            that are all equal, a later one is paired with the first one only.
    """
    second = rows if others is None else others
    if rows.hashes is None or second.hashes is None:
        return np.empty((0, 2), np.int64)
    assert rows.colours is not None
    assert rows.plain is not None
    assert second.colours is not None
    assert second.plain is not None
    ours = _equal_images(rows)
    theirs = ours if others is None else _equal_images(second)
    one, other = (np.array([group[0] for group in groups], np.int64) for groups in (ours, theirs))
    left = rows.hashes[one], rows.colours[one]
    right = None if others is None else (second.hashes[other], second.colours[other])
    return _row_pairs(_near_images(left, right, max_distance), ours, None if others is None else theirs)


def near_duplicate_images(rows: Signatures, max_distance: int) -> dict[int, int]:
    """Return the rows to skip, each with the row that stays in its place; see `first_of_groups`."""
    return _with_equal_rows(first_of_groups(similar_images(rows, max_distance)), _equal_images(rows))


def near_duplicate_texts(rows: Signatures, min_similarity: float) -> dict[int, int]:
    """Return the rows to skip, each with the row that stays in its place; see `first_of_groups`."""
    equal = _equal_texts(rows, list(rows.texts)) if rows.texts else []
    return _with_equal_rows(first_of_groups(similar_texts(rows, min_similarity)), equal)


def _equal_images(rows: Signatures) -> list[list[int]]:
    if rows.hashes is None or rows.colours is None or rows.plain is None:
        return []
    return _groups([rows.hashes, rows.colours], ~rows.plain)


def _equal_texts(rows: Signatures, columns: Sequence[str]) -> list[list[int]]:
    return _groups([rows.texts[column] for column in columns])


def _first_texts(rows: Signatures, columns: Sequence[str], groups: list[list[int]]) -> np.ndarray:
    """Return the signatures of the first row of each group, of shape (groups, columns, 128)."""
    first = np.array([group[0] for group in groups], np.int64)
    return np.stack([rows.texts[column][first] for column in columns], axis=1)


def _with_equal_rows(skipped: dict[int, int], groups: Sequence[Sequence[int]]) -> dict[int, int]:
    """Return the rows to skip with all rows that equal another one: pairs know only the first of equal rows."""
    for first, *later in groups:
        skipped |= dict.fromkeys(later, skipped.get(first, first))
    return skipped


def similar_texts(rows: Signatures, min_similarity: float, others: Signatures | None = None) -> np.ndarray:
    """Return the pairs of rows whose texts are near-duplicates in every column, as `similar_images` does.

    Args:
        min_similarity: least Jaccard similarity of the texts' character 5-grams. It is estimated, with a standard
            error of up to 0.04, and 1 % of the pairs at this similarity are missed.
        others: as for `similar_images`.
    """
    second = rows if others is None else others
    columns = [column for column in rows.texts if column in second.texts]
    if not columns or len(columns) != len(rows.texts):
        return np.empty((0, 2), np.int64)
    ours = _equal_texts(rows, columns)
    theirs = ours if others is None else _equal_texts(second, columns)
    left = _first_texts(rows, columns, ours)
    right = left if others is None else _first_texts(second, columns, theirs)
    bands, width = band_shape(min_similarity, len(columns))
    matches = np.empty(0, np.int64)  # row * number of partners + partner
    for band in range(bands):
        keys = slice(band * width, (band + 1) * width)
        of_band = [matches]
        for block in _equal_rows(left[:, :, keys], None if others is None else right[:, :, keys]):
            equal = (left[block[:, 0]] == right[block[:, 1]]).mean(axis=2)
            block = block[(equal >= min_similarity).all(axis=1)]
            of_band.append(block[:, 0] * len(right) + block[:, 1])
        matches = np.unique(np.concatenate(of_band))
    pairs = np.stack(np.divmod(matches, max(1, len(right))), axis=1)
    return _row_pairs(pairs, ours, None if others is None else theirs)


def band_shape(min_similarity: float, columns: int = 1) -> tuple[int, int]:
    """Return the number and the width of the bands of MinHash values of which one must be equal.

    It is the widest band, which compares the fewest pairs, that misses at most 1 % of the pairs at the threshold.
    """
    for width in range(PERMUTATIONS, 1, -1):
        bands = PERMUTATIONS // width
        if missing_probability(min_similarity, bands, width, columns) <= _MISSED:
            return bands, width
    return PERMUTATIONS, 1


def missing_probability(similarity: float, bands: int, width: int, columns: int = 1) -> float:
    """Return the probability that no band is equal for texts of this similarity in every column."""
    return math.pow(1 - similarity ** (width * columns), bands)


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


def _groups(signatures: Sequence[np.ndarray], compared: np.ndarray | None = None) -> list[list[int]]:
    """Return the rows of each group with the same signatures, in order: a million equal pairs are a thousand rows."""
    groups: dict[bytes, list[int]] = {}
    for row in range(len(signatures[0])) if compared is None else np.flatnonzero(compared).tolist():
        groups.setdefault(digest_of(b"".join(values[row].tobytes() for values in signatures)), []).append(row)
    return list(groups.values())


def _row_pairs(pairs: np.ndarray, ours: list[list[int]], theirs: list[list[int]] | None) -> np.ndarray:
    """Return the pairs of rows for pairs of groups, sorted."""
    if theirs is None:
        first = np.array([group[0] for group in ours], np.int64)
        repeated = [(row, group[0]) for group in ours for row in group[1:]]
        row_pairs = np.concatenate([first[pairs], np.array(repeated, np.int64).reshape(-1, 2)])
    else:
        sizes = np.array([len(group) for group in ours], np.int64)
        members = [ours[group] for group in pairs[:, 0].tolist()]
        rows = np.array([row for group in members for row in group], np.int64)
        partners = np.array([group[0] for group in theirs], np.int64)[pairs[:, 1]]
        row_pairs = np.stack([rows, np.repeat(partners, sizes[pairs[:, 0]])], axis=1)
    return row_pairs[np.lexsort((row_pairs[:, 1], row_pairs[:, 0]))]


def _near_images(
    left: tuple[np.ndarray, np.ndarray], right: tuple[np.ndarray, np.ndarray] | None, max_distance: int
) -> np.ndarray:
    """Return the pairs of images whose hashes are within a distance, and whose colours are the same.

    Args:
        left, right: hashes and colours; without `right` the pairs are among those of `left`, the later one first.
    """
    try:
        import faiss
    except ImportError as error:
        raise not_installed("images", "faiss-cpu") from error
    hashes, colours = left
    other_hashes, other_colours = left if right is None else right
    pairs = [np.empty((0, 2), np.int64)]
    if not len(hashes) or not len(other_hashes):
        return pairs[0]
    # Of hashes that differ in d bits, one of n substrings differs in d // n bits at most: none is missed.
    parts = _hash_parts(len(other_hashes), max_distance)
    index = faiss.IndexBinaryMultiHash(_HASH_BITS, parts, _HASH_BITS // parts)
    index.nflip = max_distance // parts
    if right is not None:
        index.add(np.ascontiguousarray(other_hashes))
    for start in range(0, len(hashes), _SEARCHED):
        block = np.ascontiguousarray(hashes[start : start + _SEARCHED])
        if right is None:
            index.add(block)  # later rows find these
        limits, _, numbers = index.range_search(block, max_distance + 1)
        rows = np.repeat(np.arange(start, start + len(block)), np.diff(limits).astype(np.int64))
        near = np.stack([rows, numbers], axis=1)
        if right is None:
            near = near[near[:, 0] > near[:, 1]]
        same = _same_colours(colours, other_colours, near)
        if right is None:  # either image may be the one that is made brighter
            same[~same] = _same_colours(colours, colours, near[~same][:, ::-1])
        pairs.append(near[same])
    return np.concatenate(pairs)


def _hash_parts(hashes: int, max_distance: int) -> int:
    """Return the number of substrings of a hash by which hashes are looked up in the shortest time."""

    def cost(parts: int) -> float:
        bits = _HASH_BITS // parts
        lookups = parts * sum(math.comb(bits, flipped) for flipped in range(max_distance // parts + 1))
        return lookups * (1 + _CANDIDATE * hashes / 2**bits)

    return min(range(2, 9), key=cost)


def _same_colours(first: np.ndarray, second: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Return which pairs have the same colours, up to their brightness."""
    same = []
    for block in np.array_split(pairs, max(1, len(pairs) // _BLOCK)):
        one, other = (colours[block[:, side]].astype(np.float32) for side, colours in enumerate((first, second)))
        gain = (one * other).sum(axis=1) / np.maximum((other * other).sum(axis=1), 1.0)
        gain = np.clip(gain, 1 / _BRIGHTNESS, _BRIGHTNESS)[:, None]
        same.append(np.abs(one - gain * other).max(axis=1) <= _COLOUR_DIFFERENCE)
    return np.concatenate(same)


def _equal_rows(left: np.ndarray, right: np.ndarray | None) -> Iterator[np.ndarray]:
    """Yield the pairs of numbers of equal rows in blocks; of one array, the later one first."""
    both = left if right is None else np.concatenate([left, right])
    flat = np.ascontiguousarray(both.reshape(len(both), -1))
    _, keys = np.unique(flat.view(np.dtype((np.void, flat.dtype.itemsize * flat.shape[1]))), return_inverse=True)
    keys = keys.reshape(-1)
    order = np.argsort(keys, kind="stable")
    starts = np.flatnonzero(np.diff(keys[order], prepend=-1))
    sizes = np.diff(starts, append=len(order))
    block: list[np.ndarray] = []
    held = 0
    for start, size in zip(starts[sizes > 1].tolist(), sizes[sizes > 1].tolist()):
        group = order[start : start + size]
        if right is None:
            members = [(group[number], group[:number]) for number in range(1, size)]
        else:
            of_right = group[group >= len(left)] - len(left)
            members = [(row, of_right) for row in group[group < len(left)]]
        for row, partners in members:
            block.append(np.stack([np.full(len(partners), row), partners], axis=1))
            held += len(partners)
            if held >= _BLOCK:
                yield np.concatenate(block)
                block, held = [], 0
    if block:
        yield np.concatenate(block)
