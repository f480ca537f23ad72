"""The worst searches of a model, with thumbnails: the query, the hits and the right answer."""

import base64
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from bifocal.evaluation.rows import image_source
from bifocal.modeling import load_image

_SEARCHES, _HITS = 6, 5
_SIDE = 96  # pixels of a thumbnail


def worst_searches(
    images: Sequence[Any], texts: Sequence[str], owner: np.ndarray, image_vectors: np.ndarray,
    query_vectors: np.ndarray, text_vectors: np.ndarray, to_image: np.ndarray, to_text: np.ndarray,
    images_of: Sequence[Sequence[int]], texts_of: Sequence[Sequence[int]],
) -> list[dict[str, Any]]:  # fmt: skip
    """Return the searches of each direction whose right answer has the highest rank, at most one per image.

    Args:
        images: images in any form that `load_image` reads.
        texts: the captions of all images.
        owner: (texts,) number of the image of each text.
        image_vectors, query_vectors, text_vectors: (images or texts, dimensions) unit vectors; of texts as queries and
            as what is searched.
        to_image, to_text: ranks of the right answers, see `relevant_ranks`.
        images_of, texts_of: right images of each text, and right texts of each image.

    Returns:
        For each search `query`, `hits`, `answer`, `rank` and `direction`. A query, hit or answer has a `text` or a
        `thumbnail` (a data URI); hits also have `score` and `right`. A right answer at rank 1 is not a failure.
    """
    searches = []
    for direction, ranks in (("text to image", to_image[:, 0]), ("image to text", to_text[:, 0])):
        seen: set[int] = set()
        for query in np.argsort(-ranks, kind="stable"):
            image = int(owner[query]) if direction == "text to image" else int(query)
            if ranks[query] <= 1 or len(seen) == _SEARCHES:
                break
            if image in seen:
                continue
            seen.add(image)
            if direction == "text to image":
                scores = image_vectors @ query_vectors[query]
                best = np.argsort(-scores, kind="stable")[:_HITS]
                hits = [{"thumbnail": thumbnail(images[n]), "right": bool(n in images_of[query])} for n in best]
                shown_query, answer = {"text": texts[query]}, {"thumbnail": thumbnail(images[image])}
            else:
                scores = text_vectors @ image_vectors[query]
                best = np.argsort(-scores, kind="stable")[:_HITS]
                hits = [{"text": texts[n], "right": bool(n in texts_of[query])} for n in best]
                shown_query = {"thumbnail": thumbnail(images[image])}
                answer = {"text": texts[int(np.flatnonzero(owner == image)[0])]}
            for hit, number in zip(hits, best, strict=True):
                hit["score"] = float(scores[number])
            searches.append({
                "direction": direction, "query": shown_query, "hits": hits, "answer": answer,
                "rank": int(ranks[query]),
            })  # fmt: skip
    return searches


def thumbnail(image: Any) -> str:
    """Return a small JPEG of an image as a data URI."""
    small = load_image(image_source(image))
    if max(small.size) < _SIDE // 2:  # enlarge tiny images without blurring their pixels
        scale = _SIDE // max(small.size)
        small = small.resize((small.width * scale, small.height * scale), Image.Resampling.NEAREST)
    small.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
