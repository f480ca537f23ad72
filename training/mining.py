"""Hard negatives: texts for texts with any model that embeds texts, and across modalities with a dual encoder."""

import hashlib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from transformers.utils import logging

from bifocal.data.image_decoding import disable_image_decoding
from bifocal.data.vector_cache import VectorCache, slices
from bifocal.embedding.embed import EmbedSettings
from bifocal.embedding.fingerprint import model_fingerprint
from bifocal.embedding.items import Item
from bifocal.embedding.models import EmbeddingModel
from bifocal.files import overwrite
from bifocal.modeling import BifocalModel, load_image
from bifocal.modeling.towers_bifocal import search_prompts
from bifocal.training.mining_settings import DIRECTIONS, MINED, MiningError, MiningSettings
from bifocal.training.mining_vectors import embedded_rows, first_image, image_item
from bifocal.training.task_dataset import is_missing

logger = logging.get_logger(__name__)
_NO_WORD = re.compile(r"[\W_]+")


def mine_texts(pairs: Any, model: Any, settings: MiningSettings = MiningSettings(), cache: Path | None = None) -> Any:
    """Mine negatives for text pairs with sentence-transformers' `mine_hard_negatives`.

    Texts that differ in case, spaces or punctuation only count as one, so neither a positive nor its duplicate comes
    back as a negative. The query itself does not either.

    Args:
        pairs: a `datasets.Dataset` with `query` and `positive`. Rows with the same query have several positives.
        model: a `SentenceTransformer` or a `BifocalModel`; queries and positives have its prompts "query" and
            "document" if it has them.
        cache: folder for embeddings, so that a killed run resumes with them.

    Returns:
        A data set with `query`, `positive`, `negatives`, `positive_score` and `negative_scores`, ready for a
        text-triplet task. Queries with too few negatives are skipped.

    Raises:
        MiningError: if a column is missing, or no query has enough negatives.
    """
    from datasets import Dataset
    from sentence_transformers.util import mine_hard_negatives

    _require_columns(pairs, "query", "positive")
    texts_by_row = list(zip(pairs["query"], pairs["positive"], strict=True))
    _warn_of_skipped([n for n, texts in enumerate(texts_by_row) if not all(map(_is_text, texts))], len(texts_by_row))
    first: dict[str, str] = {}
    queries, positives = (
        [first.setdefault(_key(texts[side]), texts[side]) for texts in texts_by_row if all(map(_is_text, texts))]
        for side in (0, 1)
    )
    rows = [pair for pair in dict.fromkeys(zip(queries, positives, strict=True)) if pair[0] != pair[1]]
    if len(rows) <= settings.num_negatives:
        raise MiningError(
            f"{len(rows)} different pairs are too few to find {settings.num_negatives} negatives for each."
        )
    wanted = min(settings.num_negatives + 1, len({positive for _, positive in rows}) - 1)  # one may be the query itself
    mined = mine_hard_negatives(
        Dataset.from_dict({"query": [query for query, _ in rows], "positive": [positive for _, positive in rows]}),
        _TextModel(model) if isinstance(model, BifocalModel) else model,  # type: ignore[arg-type]
        num_negatives=wanted,
        range_min=settings.range_min,
        range_max=max(settings.range_max, settings.range_min + wanted),
        absolute_margin=settings.absolute_margin,
        batch_size=settings.batch_size,
        output_format="labeled-list",
        output_scores=True,
        cache_folder=None if cache is None else _folder_of_model(cache, model),
        verbose=False,
    )
    return _as_triplets(mined, settings)


def _folder_of_model(cache: Path, model: Any) -> str:
    """Return the folder of a model's vectors: sentence-transformers names them by texts and base model only."""
    VectorCache(cache).create_folder()
    return str(cache.expanduser() / model_fingerprint(model))


class _TextModel:
    """What `mine_hard_negatives` uses of a `SentenceTransformer`, for a joint model."""

    def __init__(self, model: BifocalModel) -> None:
        from sentence_transformers.util import cos_sim, pairwise_cos_sim

        self.model, self.device = model, model.device
        self.model_card_data = SimpleNamespace(base_model=None)
        self.similarity, self.similarity_pairwise = cos_sim, pairwise_cos_sim

    def encode_query(self, texts: list[str], batch_size: int = 32, **options: Any) -> np.ndarray:
        return self.model.encode_query(texts, batch_size=batch_size, show_progress=False)

    def encode_document(self, texts: list[str], batch_size: int = 32, **options: Any) -> np.ndarray:
        return self.model.encode_document(texts, batch_size=batch_size, show_progress=False)


def _prompts(model: Any) -> dict[str, str]:
    """Return a model's prompts of queries and documents; empty if it has none."""
    prompts = model.config.prompts if isinstance(model, BifocalModel) else getattr(model, "prompts", {})
    return search_prompts(prompts)


def _as_triplets(mined: Any, settings: MiningSettings) -> Any:
    from datasets import Dataset

    columns: dict[str, list[Any]] = {name: [] for name in _TRIPLET}
    for row in mined:  # with scores, the list begins with the positive
        query, texts, scores = row["query"], row["positive"], row["scores"]
        chosen = [n for n in range(1, len(texts)) if texts[n] != query][: settings.num_negatives]
        if len(chosen) == settings.num_negatives:
            values = (query, texts[0], [texts[n] for n in chosen], float(scores[0]), [float(scores[n]) for n in chosen])
            for name, value in zip(columns, values, strict=True):
                columns[name].append(value)
    if not columns["query"]:
        raise MiningError("No query has enough negatives; lower num_negatives or absolute_margin, or raise range_max.")
    return Dataset.from_dict(columns)


_TRIPLET = ("query", "positive", "negatives", "positive_score", "negative_scores")


def mine_across(
    pairs: Any, model: Any, direction: str, cache: Path, settings: MiningSettings = MiningSettings()
) -> Any:
    """Mine images that a text is confused with, or texts that an image is confused with.

    Embeddings are written to files in `cache` batch by batch: they may exceed memory, and a killed run resumes.
    A candidate with the same image, the same `image_id` or the same caption as the query's row is never a negative.
    Rows without a readable image or a caption are skipped, and a warning names them.

    Args:
        pairs: a `datasets.Dataset` with `image` and `caption`, perhaps `image_id`.
        model: with `encode_text` and `encode_image`. Captions have its prompt "query" where images are searched for
            them, and "document" where they are searched, if it has them.
        direction: "text-to-image" or "image-to-text".

    Returns:
        A data set with, for each row of `pairs`: `row`, `negative_rows` (numbers of rows whose images, or captions,
        are the negatives), `positive_score`, `negative_scores`, and `caption` and `negative_captions` for reading. Rows
        with too few negatives are skipped.

    Raises:
        MiningError: if a column is missing, the direction is unknown, or no row has enough negatives.
    """
    from datasets import Dataset

    if direction not in DIRECTIONS[1:]:
        raise MiningError(f"direction must be one of {', '.join(DIRECTIONS[1:])}, but it is '{direction}'.")
    _require_columns(pairs, "image", "caption")
    pairs = disable_image_decoding(pairs)
    first_captions = [text[0] if isinstance(text, list) and text else text for text in pairs["caption"]]
    captions = [text if _is_text(text) else "" for text in first_captions]
    contents = image_ids(value for batch in slices(len(pairs), 256) for value in pairs[batch]["image"])
    weights = model_fingerprint(model)
    role = "query" if direction == "text-to-image" else "document"
    prompt = _prompts(model).get(role)
    decoding = "fast decoding" if settings.fast_decoding else ""
    embedding_model = EmbeddingModel(type(model).__name__, model)
    embed = EmbedSettings(
        role, prompt or "", settings.batch_size, settings.num_workers, settings.fast_decoding, thumbnails=False,
        smallest_side=0, max_pixels=None,
    )  # fmt: skip
    vectors = VectorCache(cache)
    texts = embedded_rows(
        "captions", [weights, prompt or "", *captions], len(pairs),
        lambda rows: [Item("", text) if text else None for text in captions[rows]], embedding_model, embed, vectors,
    )  # fmt: skip
    images = embedded_rows(
        "images", [weights, decoding, *contents], len(pairs),
        lambda rows: list(map(image_item, pairs[rows]["image"])), embedding_model, embed, vectors,
    )  # fmt: skip
    usable = np.isfinite(texts[:, 0]) & np.isfinite(images[:, 0])
    _warn_of_skipped(np.flatnonzero(~usable).tolist(), len(pairs))
    known = pairs["image_id"] if "image_id" in pairs.column_names else [None] * len(pairs)
    same_image = _numbers(
        [content if is_missing(image) else f"id {image}" for content, image in zip(contents, known, strict=True)]
    )
    same_caption = _numbers([_key(text) for text in captions])
    queries, candidates = (texts, images) if direction == "text-to-image" else (images, texts)
    of_candidate = same_image if direction == "text-to-image" else same_caption
    columns: dict[str, list[Any]] = {
        name: []
        for name in ("row", "negative_rows", "positive_score", "negative_scores", "caption", "negative_captions")
    }
    for start in range(0, len(queries), 256):
        rows = np.arange(start, min(start + 256, len(queries)))
        rows = rows[usable[rows]]
        block = np.asarray(queries[rows])
        positive = np.einsum("nd,nd->n", block, np.asarray(candidates[rows]))
        best, scores = _nearest(block, candidates, settings.range_max, rows, usable, same_image, same_caption)
        for number, row in enumerate(rows):
            limit = np.inf if settings.absolute_margin is None else positive[number] - settings.absolute_margin
            allowed = np.flatnonzero(np.isfinite(scores[number]) & (scores[number] <= limit))
            # Of equal images or captions, the first.
            first_of_equals: dict[int, int] = {}
            for rank in allowed[settings.range_min :]:
                first_of_equals.setdefault(of_candidate[best[number][rank]], int(rank))
            chosen = list(first_of_equals.values())[: settings.num_negatives]
            if len(chosen) == settings.num_negatives:
                others = best[number][chosen]
                columns["row"].append(int(row))
                columns["negative_rows"].append(others.tolist())
                columns["positive_score"].append(float(positive[number]))
                columns["negative_scores"].append(scores[number][chosen].tolist())
                columns["caption"].append(captions[row])
                columns["negative_captions"].append([captions[other] for other in others])
    if not columns["row"]:
        raise MiningError("No row has enough negatives; lower num_negatives or absolute_margin, or raise range_max.")
    return Dataset.from_dict(columns)


def _nearest(
    queries: np.ndarray, candidates: np.ndarray, count: int, rows: np.ndarray, usable: np.ndarray, *same: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the `count` most similar candidates of each query, most similar first, and their similarities.

    Candidates that share a number with the query's row, or are not usable, come last, at minus infinity. They must be
    excluded before the best are taken, so that a caption shared by many rows cannot fill all ranks. That is why this
    is not sentence-transformers' `semantic_search`: its score function does not know which rows it compares.
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
        order = np.argsort(-scores, axis=1, kind="stable")[:, :count]
        best, scores = np.take_along_axis(best, order, axis=1), np.take_along_axis(scores, order, axis=1)
    return best, scores


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _warn_of_skipped(rows: Sequence[int], total: int) -> None:
    if rows:
        shown = ", ".join(map(str, rows[:8])) + (", ..." if len(rows) > 8 else "")
        logger.warning(
            f"Mining skips {len(rows):,} of {total:,} rows, which have no readable text or image: "
            f"{'row' if len(rows) == 1 else 'rows'} {shown}."
        )


def image_ids(images: Iterable[Any]) -> list[str]:
    """Return a digest of each image's bytes, or of its pixels if it is decoded.

    Args:
        images: cells of a column: images, undecoded or not, or lists of them.
    """
    return [hashlib.blake2b(_content(first_image(value)), digest_size=16).hexdigest() for value in images]


def _content(image: Any) -> bytes:
    if isinstance(image, bytes):
        return image
    try:
        if isinstance(image, str):
            return Path(image).read_bytes()
        decoded = load_image(image)
    except (OSError, ValueError):
        return str(image).encode("utf-8", "surrogatepass")  # such a row is skipped later
    return f"{decoded.mode} {decoded.size}".encode() + decoded.tobytes()


def _numbers(values: list[str]) -> np.ndarray:
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(value, len(numbers)) for value in values])


def _key(text: str) -> str:
    """Return a key that is equal for texts that differ only in case, spaces and punctuation."""
    return _NO_WORD.sub(" ", text.casefold()).strip() or text


def _require_columns(data: Any, *columns: str) -> None:
    missing = [column for column in columns if column not in data.column_names]
    if missing:
        raise MiningError(f"The data has no column '{missing[0]}' (it has {', '.join(data.column_names)}).")


def write_parquet(mined: Any, path: Path) -> None:
    """Write mined negatives as a Parquet file.

    Raises:
        NotOursError: if the file exists and is not from an earlier mining run.
    """
    with overwrite(path, MINED) as scratch:
        mined.to_parquet(str(scratch))
