"""One run that embeds items and writes them to the table, part by part."""

import os
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bifocal.hub.search.items import Item, SearchError, decode_item, normalize, thumbnail
from bifocal.hub.search.sync import AddResult, SourceScan
from bifocal.hub.search.table import ROWS, Table

if TYPE_CHECKING:  # it imports torch
    from bifocal.modeling.image_batches_bifocal import ImagePreparer

# From sources and what reads one with a preparer to a note and a vector for each source; see `embed_ahead`.
EmbedImages = Callable[
    [Iterable[Any], Callable[["ImagePreparer", Any], tuple[Any, Any]]], Generator[tuple[Any, Any], None, None]
]


class Ingestion:
    """A run over items, which embeds and writes those that are not in the table and shows each one to the scan.

    Args:
        table: table to add to; the caller holds its index's lock.
        known_keys: keys in the table before the run.
        scan: is shown every item that is in the table or is written to it.
        encode_text: from texts to vectors (items, dimensions).
        embed_images: yields notes and vectors for images that it reads, see `EmbeddingModel.embed_ahead`.
        on_part_written: called with the number of parts after each new part.
    """

    def __init__(
        self, table: Table, known_keys: set[str], scan: SourceScan, encode_text: Callable[[list[str]], np.ndarray],
        embed_images: EmbedImages, on_part_written: Callable[[int], None],
    ) -> None:  # fmt: skip
        self.table, self.known_keys, self.scan, self.on_part_written = table, known_keys, scan, on_part_written
        self.encode_text, self.embed_images = encode_text, embed_images
        self.result = AddResult()
        self.unread: set[str] = set()  # names that exist, but could not be read

    def run(self, items: Iterable[Item], progress: Callable[[int], None]) -> AddResult:
        """Embed and write the items, and return the counts.

        Args:
            progress: called with the number of items read.
        """
        result, scan = self.result, self.scan
        waiting: dict[str, list[Item]] = {}
        for number, item in enumerate(items, 1):
            progress(number)
            try:
                key = item.key()
            except SearchError as error:
                self._skip([item], str(error))
                continue
            if key in waiting:
                waiting[key].append(item)
            elif key in self.known_keys or key in scan.new_keys:
                result.duplicates += key in scan.names
                result.known += key not in scan.names
                scan.see(key, item)
            else:
                waiting[key] = [item]
            if len(waiting) == ROWS:
                self._write_part(waiting)
                waiting = {}
        self._write_part(waiting)
        return result

    def _skip(self, items: Sequence[Item], reason: str) -> None:
        for item in items:
            self.result.skipped.append((item.name, reason))
            # A file that a table names and that is deleted is missing; others may be readable next time.
            if not isinstance(item.image, str | Path) or os.path.lexists(item.image):
                self.unread.add(item.name)

    def _write_part(self, waiting: dict[str, list[Item]]) -> None:
        """Embed items of different content and write them as one part.

        Args:
            waiting: items by key.
        """
        sources = {key: items[0].image for key, items in waiting.items() if items[0].image is not None}
        with closing(self.embed_images(sources.values(), _read)) as embedded_images:
            images = dict(zip(sources, embedded_images, strict=True))
        rows: list[dict[str, Any]] = []
        for key, items in waiting.items():
            note, _ = images.get(key, (None, None))
            if isinstance(note, SearchError):
                self._skip(items, str(note))
            else:
                rows.append({"key": key, "kind": items[0].kind, "text": items[0].text, "image": note})
        texts = [row["text"] for row in rows if row["kind"] == "text"]
        text_vectors = iter(self.encode_text(texts) if texts else ())
        embedded = []
        for row in rows:
            vector = next(text_vectors) if row["kind"] == "text" else images[row["key"]][1]
            row["embedding"] = normalize(np.asarray(vector, np.float32))
            items = waiting[row["key"]]
            if not np.isfinite(row["embedding"]).all():
                self._skip(items, "its embedding is not finite")
                continue
            for item in items:
                self.scan.see(row["key"], item)
            self.scan.new_keys.add(row["key"])
            row["occurrences"] = self.scan.occurrences(row["key"])
            self.result.duplicates += len(items) - 1
            embedded.append(row)
        if embedded:
            self.on_part_written(self.table.append(embedded))
            self.result.new += len(embedded)


def _read(preparer: "ImagePreparer", source: Any) -> tuple[bytes | SearchError, Any]:
    """Return an image's thumbnail and what is embedded of it; an error and None if it cannot be read."""
    try:
        decoded = decode_item(source, preparer)
    except SearchError as error:
        return error, None
    return thumbnail(decoded.image), preparer.prepare(decoded)
