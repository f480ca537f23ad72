"""The worst searches of a model, with their pictures: what was asked, what was found, what should have been."""

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
    images: Sequence[Any], texts: Sequence[str], owner: np.ndarray, image_vectors: np.ndarray, text_vectors: np.ndarray,
    to_image: np.ndarray, to_text: np.ndarray, images_of: Sequence[Sequence[int]], texts_of: Sequence[Sequence[int]],
) -> list[dict[str, Any]]:  # fmt: skip
    """The searches whose right answer came last, some of each direction, each picture at most once as an answer.

    Args:
        owner: the picture of each text.
        to_image, to_text: ranks of the right answers, see `relevant_ranks`.
        images_of, texts_of: right images of each text, and right texts of each image.

    Returns:
        For each search `query`, `hits` and `answer` (with `text` or `thumbnail`, a data URI, and for hits `score` and
        `right`), `rank` and `direction`. Searches that found the right answer first are not among them.
    """
    found = []
    for direction, ranks in (("text to image", to_image[:, 0]), ("image to text", to_text[:, 0])):
        seen: set[int] = set()
        for query in np.argsort(-ranks, kind="stable"):
            picture = int(owner[query]) if direction == "text to image" else int(query)
            if ranks[query] <= 1 or len(seen) == _SEARCHES:
                break
            if picture in seen:
                continue
            seen.add(picture)
            if direction == "text to image":
                scores = image_vectors @ text_vectors[query]
                best = np.argsort(-scores, kind="stable")[:_HITS]
                hits = [{"thumbnail": thumbnail(images[n]), "right": bool(n in images_of[query])} for n in best]
                asked, answer = {"text": texts[query]}, {"thumbnail": thumbnail(images[picture])}
            else:
                scores = text_vectors @ image_vectors[query]
                best = np.argsort(-scores, kind="stable")[:_HITS]
                hits = [{"text": texts[n], "right": bool(n in texts_of[query])} for n in best]
                asked = {"thumbnail": thumbnail(images[picture])}
                answer = {"text": texts[int(np.flatnonzero(owner == picture)[0])]}
            for hit, number in zip(hits, best, strict=True):
                hit["score"] = float(scores[number])
            search = {"direction": direction, "query": asked, "hits": hits, "answer": answer, "rank": int(ranks[query])}
            found.append(search)
    return found


def thumbnail(image: Any) -> str:
    """A small JPEG as a data URI."""
    picture = load_image(image_source(image))
    if max(picture.size) < _SIDE // 2:  # a tiny picture is shown larger, with its pixels as they are
        scale = _SIDE // max(picture.size)
        picture = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
    picture.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
