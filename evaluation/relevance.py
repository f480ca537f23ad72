"""Right answers of retrieval queries if rows share a text or an image.

A text that two images have in common is a right answer for both: training excludes such pairs from the negatives, and
a model that finds one of them is not wrong.
"""

from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence

import numpy as np


def right_answers(
    queries: Sequence[Hashable], items: Sequence[Hashable], pairs: Iterable[tuple[int, int]]
) -> list[list[int]]:
    """Return the numbers of the right items of each query, in ascending order.

    An item is right if a query of equal content is paired with an item of equal content.

    Args:
        queries, items: (Q,) and (N,) keys that equal contents share: texts, image ids, digests.
        pairs: (number of a query, number of an item) of each row.
    """
    right_keys: dict[Hashable, set[Hashable]] = defaultdict(set)
    for query, item in pairs:
        right_keys[queries[query]].add(items[item])
    numbers: dict[Hashable, list[int]] = defaultdict(list)
    for number, key in enumerate(items):
        numbers[key].append(number)
    # One list for all queries of equal content.
    right = {query: sorted(number for key in keys for number in numbers[key]) for query, keys in right_keys.items()}
    return [right.get(key, []) for key in queries]


def caption_answers(
    owner: np.ndarray, text_ids: np.ndarray, image_ids: np.ndarray
) -> tuple[list[list[int]], list[list[int]]]:
    """Return the right images of each text, and the right texts of each image.

    Args:
        owner: (texts,) number of the image of each text.
        text_ids, image_ids: (texts,) and (images,) integers that equal contents share.
    """
    pairs = list(enumerate(owner.tolist()))
    texts, images = text_ids.tolist(), image_ids.tolist()
    return (
        right_answers(texts, images, pairs),
        right_answers(images, texts, ((image, text) for text, image in pairs)),
    )


def content_ids(contents: Sequence[Hashable]) -> np.ndarray:
    """Return (contents,) integers that are equal for equal contents, numbered by first appearance."""
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(content, len(numbers)) for content in contents], dtype=np.int64)


def shared_rows(owner: np.ndarray, text_ids: np.ndarray, image_ids: np.ndarray) -> int:
    """Return the number of texts that share their text or image with the row of another image.

    Args: see `caption_answers`.
    """
    images_of: dict[int, set[int]] = defaultdict(set)
    for text, image in zip(text_ids.tolist(), owner.tolist(), strict=True):
        images_of[text].add(image)
    repeated = np.bincount(image_ids)[image_ids] > 1
    return sum(
        len(images_of[text]) > 1 or bool(repeated[image])
        for text, image in zip(text_ids.tolist(), owner.tolist(), strict=True)
    )
