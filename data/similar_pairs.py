"""Pairs of images and of texts whose signatures are similar."""

import math
from collections.abc import Iterator, Sequence

import numpy as np

from bifocal.data.signatures import PERMUTATIONS, Signatures, digest_of, not_installed

BLOCK = 4096  # pairs compared at a time
SEARCHED = 256  # hashes looked up at a time; each may have a pair with every other one

_HASH_BITS = 64
_CANDIDATE = 12  # lookups in the time in which one hash is compared, measured
_COLOUR_DIFFERENCE = 32.0  # of 255, in any field, after the brightness is made equal
_BRIGHTNESS = 4 / 3  # largest ratio of brightness that is made equal
_MISSED = 0.01  # largest probability that a pair at the threshold is missed


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
    ours = equal_images(rows)
    theirs = ours if others is None else equal_images(second)
    one, other = (np.array([group[0] for group in groups], np.int64) for groups in (ours, theirs))
    left = rows.hashes[one], rows.colours[one]
    right = None if others is None else (second.hashes[other], second.colours[other])
    return _row_pairs(_near_images(left, right, max_distance), ours, None if others is None else theirs)


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
    ours = equal_texts(rows, columns)
    theirs = ours if others is None else equal_texts(second, columns)
    left = first_texts(rows, columns, ours)
    right = left if others is None else first_texts(second, columns, theirs)
    bands, width = band_shape(min_similarity, len(columns))
    matches = np.empty(0, np.int64)  # row * number of partners + partner
    both = left if others is None else np.concatenate([left, right])
    for band in range(bands):
        of_band = [matches]
        for block in _equal_rows(band_keys(both, band, width), None if others is None else len(left)):
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


def equal_images(rows: Signatures) -> list[list[int]]:
    """Return the rows of each group of equal images that are not of one colour, in order."""
    if rows.hashes is None or rows.colours is None or rows.plain is None:
        return []
    return _groups([rows.hashes, rows.colours], ~rows.plain)


def equal_texts(rows: Signatures, columns: Sequence[str]) -> list[list[int]]:
    """Return the rows of each group with equal texts, in order."""
    return _groups([rows.texts[column] for column in columns])


def first_texts(rows: Signatures, columns: Sequence[str], groups: list[list[int]]) -> np.ndarray:
    """Return the signatures of the first row of each group, of shape (groups, columns, 128)."""
    first = np.array([group[0] for group in groups], np.int64)
    return np.stack([rows.texts[column][first] for column in columns], axis=1)


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
    hashes, colours = left
    other_hashes, other_colours = left if right is None else right
    pairs = [np.empty((0, 2), np.int64)]
    if not len(hashes) or not len(other_hashes):
        return pairs[0]
    index = HashIndex(len(other_hashes), max_distance)
    index.add(other_hashes)
    for start in range(0, len(hashes), SEARCHED):
        near = index.pairs(hashes[start : start + SEARCHED]) + np.array([start, 0])
        if right is None:
            near = near[near[:, 0] > near[:, 1]]
            pairs.append(near[same_colours(colours, near)])
        else:
            pairs.append(near[_same_colours(colours, other_colours, near)])
    return np.concatenate(pairs)


class HashIndex:
    """Hashes in which all within a distance of others are found.

    Args:
        size: number of hashes that will be added.
        max_distance: number of bits, of 64, in which hashes may differ.

    Raises:
        DataError: if faiss is not installed.
    """

    def __init__(self, size: int, max_distance: int) -> None:
        try:
            import faiss
        except ImportError as error:
            raise not_installed("images", "faiss-cpu") from error
        self.max_distance = max_distance
        # Of hashes that differ in d bits, one of n substrings differs in d // n bits at most: none is missed.
        parts = _hash_parts(size, max_distance)
        self._index = faiss.IndexBinaryMultiHash(_HASH_BITS, parts, _HASH_BITS // parts)
        self._index.nflip = max_distance // parts

    def add(self, hashes: np.ndarray) -> None:
        """Add hashes, which are numbered as they come."""
        if len(hashes):
            self._index.add(np.ascontiguousarray(hashes))

    def pairs(self, hashes: np.ndarray) -> np.ndarray:
        """Return the pairs (number of the hash, number of one in the index) within the distance."""
        limits, _, numbers = self._index.range_search(np.ascontiguousarray(hashes), self.max_distance + 1)
        return np.stack([np.repeat(np.arange(len(hashes)), np.diff(limits).astype(np.int64)), numbers], axis=1)


def _hash_parts(hashes: int, max_distance: int) -> int:
    """Return the number of substrings of a hash by which hashes are looked up in the shortest time."""

    def cost(parts: int) -> float:
        bits = _HASH_BITS // parts
        lookups = parts * sum(math.comb(bits, flipped) for flipped in range(max_distance // parts + 1))
        return lookups * (1 + _CANDIDATE * hashes / 2**bits)

    return min(range(2, 9), key=cost)


def same_colours(colours: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Return which pairs of images have the same colours; either image may be the one that is made brighter."""
    same = _same_colours(colours, colours, pairs)
    same[~same] = _same_colours(colours, colours, pairs[~same][:, ::-1])
    return same


def _same_colours(first: np.ndarray, second: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Return which pairs have the same colours, up to their brightness."""
    same = []
    for block in np.array_split(pairs, max(1, len(pairs) // BLOCK)):
        one, other = (colours[block[:, side]].astype(np.float32) for side, colours in enumerate((first, second)))
        gain = (one * other).sum(axis=1) / np.maximum((other * other).sum(axis=1), 1.0)
        gain = np.clip(gain, 1 / _BRIGHTNESS, _BRIGHTNESS)[:, None]
        same.append(np.abs(one - gain * other).max(axis=1) <= _COLOUR_DIFFERENCE)
    return np.concatenate(same)


def band_keys(texts: np.ndarray, band: int, width: int) -> np.ndarray:
    """Return a number for the values of each row in a band, the same one for equal values.

    Args:
        texts: MinHash values of shape (rows, columns, 128).
    """
    of_band = texts[:, :, band * width : (band + 1) * width]
    flat = np.ascontiguousarray(of_band.reshape(len(of_band), -1))
    _, keys = np.unique(flat.view(np.dtype((np.void, flat.dtype.itemsize * flat.shape[1]))), return_inverse=True)
    return keys.reshape(-1)


def _equal_rows(keys: np.ndarray, count: int | None) -> Iterator[np.ndarray]:
    """Yield the pairs of numbers of rows with equal keys in blocks.

    Args:
        count: number of rows of which each is paired with those after them; None pairs all, the later one first.
    """
    order = np.argsort(keys, kind="stable")
    starts = np.flatnonzero(np.diff(keys[order], prepend=-1))
    sizes = np.diff(starts, append=len(order))
    block: list[np.ndarray] = []
    held = 0
    for start, size in zip(starts[sizes > 1].tolist(), sizes[sizes > 1].tolist()):
        group = order[start : start + size]
        if count is None:
            members = [(group[number], group[:number]) for number in range(1, size)]
        else:
            of_right = group[group >= count] - count
            members = [(row, of_right) for row in group[group < count]]
        for row, partners in members:
            block.append(np.stack([np.full(len(partners), row), partners], axis=1))
            held += len(partners)
            if held >= BLOCK:
                yield np.concatenate(block)
                block, held = [], 0
    if block:
        yield np.concatenate(block)
