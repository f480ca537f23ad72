"""One run that embeds items and writes them to the table, part by part."""

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bifocal.hub.search.items import Item, SearchError, normalize, read_image, thumbnail
from bifocal.hub.search.sync import AddResult, SourceScan
from bifocal.hub.search.table import ROWS, Table

_MAX_PIXELS_IN_MEMORY = 2**28  # of decoded images, 0.8 GB; a whole part of photos would take dozens


class Ingestion:
    """A run over items, which embeds and writes those that are not in the table and shows each one to the scan.

    Args:
        table: table to add to; the caller holds its index's lock.
        known_keys: keys in the table before the run.
        scan: is shown every item that is in the table or is written to it.
        encode_text, encode_image: from texts or images to vectors (items, dimensions).
        on_part_written: called with the number of parts after each new part.
    """

    def __init__(
        self, table: Table, known_keys: set[str], scan: SourceScan, encode_text: Callable[[list[str]], np.ndarray],
        encode_image: Callable[[list[Any]], np.ndarray], on_part_written: Callable[[int], None],
    ) -> None:  # fmt: skip
        self.table, self.known_keys, self.scan, self.on_part_written = table, known_keys, scan, on_part_written
        self.encode_text, self.encode_image = encode_text, encode_image
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
        rows: list[dict[str, Any]] = []
        images: list[Any] = []
        image_vectors: list[np.ndarray] = []
        for key, items in waiting.items():
            first = items[0]
            row: dict[str, Any] = {"key": key, "kind": first.kind, "text": first.text, "image": None}
            if first.image is not None:
                try:
                    image = read_image(first.image)
                except SearchError as error:
                    self._skip(items, str(error))
                    continue
                row["image"] = thumbnail(image)
                images.append(image)
                if sum(image.width * image.height for image in images) > _MAX_PIXELS_IN_MEMORY:
                    image_vectors += list(self.encode_image(images))
                    images = []
            rows.append(row)
        texts = [row["text"] for row in rows if row["kind"] == "text"]
        image_vectors += list(self.encode_image(images)) if images else []
        vectors = {"text": iter(self.encode_text(texts) if texts else ()), "image": iter(image_vectors)}
        embedded = []
        for row in rows:
            row["embedding"] = normalize(np.asarray(next(vectors[row["kind"]]), np.float32))
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
