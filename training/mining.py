"""Hard negatives: texts for texts with any sentence-transformers model, and across modalities with a dual encoder."""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers.utils import logging

from bifocal.data.image_decoding import disable_image_decoding
from bifocal.errors import BifocalError
from bifocal.files import overwrite, write_json
from bifocal.modeling import load_image
from bifocal.training.task_dataset import is_missing

logger = logging.get_logger(__name__)
MINED = "file of mined negatives"
DIRECTIONS = ("text-to-text", "text-to-image", "image-to-text")
_NO_WORD = re.compile(r"[\W_]+")


class MiningError(BifocalError):
    """What cannot be mined, in one sentence."""


@dataclass(frozen=True)
class MiningSettings:
    """
    Args:
        negatives: how many for each query.
        skip: leave out the first so many candidates, which may be right answers nobody marked.
        depth: look at so many candidates, the skipped ones included.
        margin: a negative's similarity is at least so much below the positive's; None sets no such bound.
        batch_size: of embedding.
    """

    negatives: int = 7
    skip: int = 0
    depth: int = 100
    margin: float | None = None
    batch_size: int = 64

    def __post_init__(self) -> None:
        if self.negatives < 1 or self.skip < 0 or self.depth < self.skip + self.negatives:
            raise MiningError(
                f"Mining needs at least one negative and depth >= skip + negatives, not negatives={self.negatives}, "
                f"skip={self.skip}, depth={self.depth}."
            )


def mine_texts(pairs: Any, model: Any, settings: MiningSettings = MiningSettings(), cache: Path | None = None) -> Any:
    """Negatives for text pairs, by sentence-transformers' `mine_hard_negatives`.

    Texts that differ in case, spaces or punctuation only count as one, so neither a positive nor its duplicate comes
    back as a negative; nor does the query itself.

    Args:
        pairs: a `datasets.Dataset` with `query` and `positive`. Rows with the same query have several positives.
        model: a `SentenceTransformer`.
        cache: folder for embeddings, which a run that was killed finds again.

    Returns:
        A data set with `query`, `positive`, `negatives`, `positive_score` and `negative_scores`, ready for a
        text-triplet task. Queries for which too few negatives are left are not in it.

    Raises:
        MiningError: missing columns, or no query with enough negatives.
    """
    from datasets import Dataset
    from sentence_transformers.util import mine_hard_negatives

    _require_columns(pairs, "query", "positive")
    given = list(zip(pairs["query"], pairs["positive"], strict=True))
    _say_skipped([number for number, texts in enumerate(given) if not all(map(_is_text, texts))], len(given))
    first: dict[str, str] = {}
    queries, positives = (
        [first.setdefault(_key(texts[side]), texts[side]) for texts in given if all(map(_is_text, texts))]
        for side in (0, 1)
    )
    rows = [pair for pair in dict.fromkeys(zip(queries, positives, strict=True)) if pair[0] != pair[1]]
    if len(rows) <= settings.negatives:
        raise MiningError(f"{len(rows)} different pairs are too few to find {settings.negatives} negatives for each.")
    wanted = min(settings.negatives + 1, len({positive for _, positive in rows}) - 1)  # one may be the query itself
    mined = mine_hard_negatives(
        Dataset.from_dict({"query": [query for query, _ in rows], "positive": [positive for _, positive in rows]}),
        model,
        num_negatives=wanted,
        range_min=settings.skip,
        range_max=max(settings.depth, settings.skip + wanted),
        absolute_margin=settings.margin,
        batch_size=settings.batch_size,
        output_format="labeled-list",
        output_scores=True,
        # sentence-transformers names what it keeps by texts and base model only.
        cache_folder=None if cache is None else str(cache / _weights_key(model)),
        verbose=False,
    )
    return _as_triplets(mined, settings)


def _as_triplets(mined: Any, settings: MiningSettings) -> Any:
    from datasets import Dataset

    found: dict[str, list[Any]] = {name: [] for name in _TRIPLET}
    for row in mined:  # with scores, the list begins with the positive
        query, texts, scores = row["query"], row["positive"], row["scores"]
        chosen = [n for n in range(1, len(texts)) if texts[n] != query][: settings.negatives]
        if len(chosen) == settings.negatives:
            values = (query, texts[0], [texts[n] for n in chosen], float(scores[0]), [float(scores[n]) for n in chosen])
            for name, value in zip(found, values, strict=True):
                found[name].append(value)
    if not found["query"]:
        raise MiningError("No query has enough negatives; ask for fewer, look deeper or lower the margin.")
    return Dataset.from_dict(found)


_TRIPLET = ("query", "positive", "negatives", "positive_score", "negative_scores")


def mine_across(
    pairs: Any, model: Any, direction: str, cache: Path, settings: MiningSettings = MiningSettings()
) -> Any:
    """Pictures that a text is confused with, or texts that a picture is confused with.

    Embeddings go to files in `cache` batch by batch, so that neither they nor a killed run's work must fit anywhere
    else. A candidate with the same picture, the same `image_id` or the same caption as the query's row is no negative.
    Rows without a readable image or a caption are skipped, and a warning names them.

    Args:
        pairs: a `datasets.Dataset` with `image` and `caption`, perhaps `image_id`.
        model: with `encode_text` and `encode_image`.
        direction: "text-to-image" or "image-to-text".

    Returns:
        A data set with, for each row of `pairs`: `row`, `negative_rows` (numbers of rows whose pictures, or captions,
        are the negatives), `positive_score`, `negative_scores`, and `caption` and `negative_captions` for reading. Rows
        for which too few negatives are left are not in it.

    Raises:
        MiningError: missing columns, an unknown direction, or no row with enough negatives.
    """
    from datasets import Dataset

    if direction not in DIRECTIONS[1:]:
        raise MiningError(f"direction must be one of {', '.join(DIRECTIONS[1:])}, but it is '{direction}'.")
    _require_columns(pairs, "image", "caption")
    pairs = disable_image_decoding(pairs)
    given = [text[0] if isinstance(text, list) and text else text for text in pairs["caption"]]
    captions = [text if _is_text(text) else "" for text in given]
    contents = _picture_ids(pairs)
    weights = _weights_key(model)
    texts = _embedded(
        [text or None for text in captions], model.encode_text, cache / f"captions-{_digest(weights, *captions)}",
        settings,
    )  # fmt: skip
    images = _embedded(_Images(pairs), model.encode_image, cache / f"images-{_digest(weights, *contents)}", settings)
    usable = np.isfinite(texts[:, 0]) & np.isfinite(images[:, 0])
    _say_skipped(np.flatnonzero(~usable).tolist(), len(pairs))
    known = pairs["image_id"] if "image_id" in pairs.column_names else [None] * len(pairs)
    same_picture = _numbers(
        [content if is_missing(image) else f"id {image}" for content, image in zip(contents, known, strict=True)]
    )
    same_caption = _numbers([_key(text) for text in captions])
    queries, candidates = (texts, images) if direction == "text-to-image" else (images, texts)
    of_candidate = same_picture if direction == "text-to-image" else same_caption
    found: dict[str, list[Any]] = {
        name: []
        for name in ("row", "negative_rows", "positive_score", "negative_scores", "caption", "negative_captions")
    }
    for start in range(0, len(queries), 256):
        rows = np.arange(start, min(start + 256, len(queries)))
        rows = rows[usable[rows]]
        block = np.asarray(queries[rows])
        positive = np.einsum("nd,nd->n", block, np.asarray(candidates[rows]))
        best, scores = _nearest(block, candidates, settings.depth, rows, usable, same_picture, same_caption)
        for place, row in enumerate(rows):
            chosen: list[int] = []
            seen: set[int] = set()
            for rank, (other, score) in enumerate(zip(best[place], scores[place], strict=True)):
                if not np.isfinite(score) or len(chosen) == settings.negatives:
                    break
                allowed = settings.margin is None or score <= positive[place] - settings.margin
                if rank >= settings.skip and allowed and of_candidate[other] not in seen:
                    chosen.append(rank)
                    seen.add(of_candidate[other])
            if len(chosen) == settings.negatives:
                others = best[place][chosen]
                found["row"].append(int(row))
                found["negative_rows"].append(others.tolist())
                found["positive_score"].append(float(positive[place]))
                found["negative_scores"].append(scores[place][chosen].tolist())
                found["caption"].append(captions[row])
                found["negative_captions"].append([captions[other] for other in others])
    if not found["row"]:
        raise MiningError("No row has enough negatives; ask for fewer, look deeper or lower the margin.")
    return Dataset.from_dict(found)


def _nearest(
    queries: np.ndarray, candidates: np.ndarray, depth: int, rows: np.ndarray, usable: np.ndarray, *same: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The `depth` most similar candidates of each query, most similar first, and how similar they are.

    Candidates that share a number with the query's row, or are not usable, come last, at minus infinity.
    """
    best = np.zeros((len(queries), 0), dtype=np.int64)
    scores = np.zeros((len(queries), 0), dtype=np.float32)
    for start in range(0, len(candidates), 16384):
        block = np.asarray(candidates[start : start + 16384])
        here = np.where(usable[start : start + len(block)], queries @ block.T, -np.inf)
        for numbers in same:
            here[numbers[rows][:, None] == numbers[start : start + len(block)][None, :]] = -np.inf
        ids = np.broadcast_to(np.arange(start, start + len(block)), here.shape)
        best, scores = np.concatenate([best, ids], axis=1), np.concatenate([scores, here], axis=1)
        order = np.argsort(-scores, axis=1, kind="stable")[:, :depth]
        best, scores = np.take_along_axis(best, order, axis=1), np.take_along_axis(scores, order, axis=1)
    return best, scores


class _Images(Sequence):
    """The images of a data set, read when they are asked for; None for one that cannot be read."""

    def __init__(self, pairs: Any) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, rows: Any) -> Any:
        return [_readable(value) for value in self.pairs[rows]["image"]]


def _readable(value: Any) -> Any:
    try:
        return load_image(_one(value))
    except (OSError, ValueError):
        return None


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _say_skipped(rows: Sequence[int], total: int) -> None:
    if rows:
        shown = ", ".join(map(str, rows[:8])) + (", ..." if len(rows) > 8 else "")
        logger.warning(
            f"Mining skips {len(rows):,} of {total:,} rows, which lack a text or an image that can be read: "
            f"{'row' if len(rows) == 1 else 'rows'} {shown}."
        )


def _one(value: Any) -> Any:
    chosen = value[0] if isinstance(value, list) and value else value
    if isinstance(chosen, dict):
        return chosen["bytes"] if chosen["bytes"] is not None else chosen["path"]
    return chosen


def _picture_ids(pairs: Any) -> list[str]:
    """Equal for pictures of equal bytes."""
    found = []
    for batch in _slices(len(pairs), 256):
        for value in pairs[batch]["image"]:
            picture = _one(value)
            try:
                content = Path(picture).read_bytes() if isinstance(picture, str) else picture
            except OSError:
                content = str(picture).encode()  # it cannot be read, and is skipped
            content = content if isinstance(content, bytes) else np.asarray(content).tobytes()
            found.append(hashlib.blake2b(content, digest_size=16).hexdigest())
    return found


def _digest(*parts: str) -> str:
    joined = hashlib.blake2b(digest_size=8)
    for part in parts:
        joined.update(part.encode("utf-8", "surrogatepass") + b"\0")
    return joined.hexdigest()


def _weights_key(model: Any) -> str:
    """Names a model's weights, so that embeddings kept for one are never taken for another's."""
    joined = hashlib.blake2b(digest_size=8)
    for name, value in sorted(model.state_dict().items()):
        joined.update(name.encode() + value.detach().cpu().float().contiguous().numpy().tobytes())
    return joined.hexdigest()


def _embedded(items: Sequence[Any], encode: Any, path: Path, settings: MiningSettings) -> np.ndarray:
    """(items, dimensions) in a file; what a killed run left there is not embedded again. An item None is NaN.

    Raises:
        MiningError: if the files there are not of a mining run.
    """
    file, progress = path.with_suffix(".npy"), path.with_suffix(".json")
    done = _progress(file, progress)
    vectors = np.load(file, mmap_mode="r+") if done else None
    for batch in _slices(len(items), 16 * settings.batch_size, done):
        present = [(batch.start + n, item) for n, item in enumerate(items[batch]) if item is not None]
        if present:
            found = encode([item for _, item in present], batch_size=settings.batch_size, show_progress=False)
            if vectors is None:
                vectors = np.lib.format.open_memmap(file, "w+", np.float32, (len(items), found.shape[1]))
                vectors[:] = np.nan
            vectors[[number for number, _ in present]] = found
        if vectors is None:
            raise MiningError(f"None of the first {batch.stop} rows can be embedded; look at their images and texts.")
        vectors.flush()
        write_json(progress, {"done": batch.stop})
    assert vectors is not None
    return vectors


def _progress(file: Path, progress: Path) -> int:
    """How many embeddings of a file are made; begins a file of progress, by which the other is known as ours."""
    try:
        found = json.loads(progress.read_text(encoding="utf-8")) if progress.exists() else None
    except ValueError:
        found = {}
    ours = isinstance(found, dict) and set(found) == {"done"}
    if (found is not None and not ours) or (found is None and file.exists()):
        raise MiningError(
            f"'{progress if found is not None else file}' is no file of a mining run, and one would be written there; "
            "choose another cache folder."
        )
    if found is None:
        write_json(progress, {"done": 0})
    return found["done"] if found and file.exists() else 0


def _slices(count: int, size: int, start: int = 0) -> Iterator[slice]:
    for first in range(start, count, size):
        yield slice(first, min(first + size, count))


def _numbers(values: list[str]) -> np.ndarray:
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(value, len(numbers)) for value in values])


def _key(text: str) -> str:
    """Equal for texts that differ in case, spaces and punctuation only."""
    return _NO_WORD.sub(" ", text.casefold()).strip() or text


def _require_columns(data: Any, *columns: str) -> None:
    missing = [column for column in columns if column not in data.column_names]
    if missing:
        raise MiningError(f"The data has no column '{missing[0]}' (it has {', '.join(data.column_names)}).")


def write_parquet(mined: Any, path: Path) -> None:
    """Write what was mined, whole or not at all.

    Raises:
        NotOursError: if a file is there that is not of an earlier mining run.
    """
    with overwrite(path, MINED) as scratch:
        mined.to_parquet(str(scratch))
