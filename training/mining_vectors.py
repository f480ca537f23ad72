"""Vectors of texts and images for mining, written to files batch by batch."""

import json
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bifocal.files import write_json
from bifocal.modeling.image_batches_bifocal import embed_ahead
from bifocal.training.mining_settings import MiningError, MiningSettings

_BATCHES_SAVED = 16  # batches that are written at once: a killed run loses at most as many
Vectors = Generator[np.ndarray | None, None, None]


def text_vectors(captions: list[str], model: Any, prompt: str | None, settings: MiningSettings, start: int) -> Vectors:
    """Yield the vectors of captions from row `start` on; None for an empty one."""
    encode = model.encode_text if prompt is None else partial(model.encode_text, prompt=prompt)
    for batch in slices(len(captions), _BATCHES_SAVED * settings.batch_size, start):
        texts = [text for text in captions[batch] if text]
        vectors = iter(encode(texts, batch_size=settings.batch_size, show_progress=False) if texts else ())
        yield from (next(vectors) if text else None for text in captions[batch])


def image_vectors(pairs: Any, model: Any, settings: MiningSettings, start: int) -> Vectors:
    """Yield the vectors of images from row `start` on; None for one that cannot be read."""
    preparer = model.image_preparer(settings.fast_decoding)
    encode = partial(model.encode_image, batch_size=settings.batch_size, show_progress=False)

    def read(value: Any) -> tuple[None, Any]:
        try:
            return None, preparer.prepare(preparer.decode(first_image(value)))
        except (OSError, ValueError):
            return None, None

    values = (value for batch in slices(len(pairs), 256, start) for value in pairs[batch]["image"])
    ahead = embed_ahead(values, read, encode, preparer, settings.batch_size, settings.num_workers)
    with closing(ahead) as embedded:
        yield from (vector for _, vector in embedded)


def first_image(value: Any) -> Any:
    """Return the image of a row, the first of several, as bytes or path if it is undecoded."""
    chosen = value[0] if isinstance(value, list) and value else value
    if isinstance(chosen, dict):
        return chosen["bytes"] if chosen["bytes"] is not None else chosen["path"]
    return chosen


def embedded_rows(
    count: int, vectors_from: Callable[[int], Vectors], path: Path, settings: MiningSettings
) -> np.ndarray:
    """Write the vectors of rows into a file and return it as an array (rows, dimensions), NaN where there is none.

    Embeddings that a killed run left there are kept.

    Args:
        count: number of rows.
        vectors_from: yields the vectors of the rows from a given one on.
        path: of the file, without suffix.

    Raises:
        MiningError: if the files there are not those of a mining run.
    """
    file, progress = path.with_suffix(".npy"), path.with_suffix(".json")
    done = _progress(file, progress)
    vectors = np.load(file, mmap_mode="r+") if done else None
    with closing(vectors_from(done)) as rest:
        for batch in slices(count, _BATCHES_SAVED * settings.batch_size, done):
            embedded = {row: vector for row, vector in zip(range(batch.start, batch.stop), rest) if vector is not None}
            if embedded and vectors is None:
                length = len(next(iter(embedded.values())))
                vectors = np.lib.format.open_memmap(file, "w+", np.float32, (count, length))
                vectors[:] = np.nan
            if vectors is None:
                raise MiningError(
                    f"None of the first {batch.stop} rows can be embedded; look at their images and texts."
                )
            if embedded:
                vectors[list(embedded)] = list(embedded.values())
            vectors.flush()
            write_json(progress, {"done": batch.stop})
    assert vectors is not None
    return vectors


def _progress(file: Path, progress: Path) -> int:
    """Return how many embeddings of a file are complete; start its progress file, which marks it as ours."""
    try:
        state = json.loads(progress.read_text(encoding="utf-8")) if progress.exists() else None
    except ValueError:
        state = {}
    ours = isinstance(state, dict) and set(state) == {"done"}
    if (state is not None and not ours) or (state is None and file.exists()):
        raise MiningError(
            f"'{progress if state is not None else file}' is not a file of a mining run, and would be overwritten. "
            "Choose another cache folder."
        )
    if state is None:
        write_json(progress, {"done": 0})
    return state["done"] if state and file.exists() else 0


def slices(count: int, size: int, start: int = 0) -> Iterator[slice]:
    """Yield the slices of `size` rows, from row `start` to row `count`."""
    for first in range(start, count, size):
        yield slice(first, min(first + size, count))
