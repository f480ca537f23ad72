"""One run that embeds items and writes them, part by part."""

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bifocal.hub.search.items import Item, SearchError, read_picture, thumbnail, unit
from bifocal.hub.search.mirror import Added, Scan
from bifocal.hub.search.table import ROWS, Table

_PIXELS = 2**28  # of decoded images that are held at once, 0.8 GB: a part of photos would take dozens


class Adding:
    """A run over items: those that the table lacks are embedded and written, all are told to the scan.

    Args:
        table: to add to; its index's lock is held.
        before: keys that are in it.
        scan: told of every item that is in the table or comes into it.
        encode_text, encode_image: to vectors (items, dimensions).
        wrote: called with the number of parts after each that was written.
    """

    def __init__(
        self, table: Table, before: set[str], scan: Scan, encode_text: Callable[[list[str]], np.ndarray],
        encode_image: Callable[[list[Any]], np.ndarray], wrote: Callable[[int], None],
    ) -> None:  # fmt: skip
        self.table, self.before, self.scan, self.wrote = table, before, scan, wrote
        self.encode_text, self.encode_image = encode_text, encode_image
        self.done = Added()
        self.unread: set[str] = set()  # names that are there, but could not be read

    def run(self, items: Iterable[Item], progress: Callable[[int], None]) -> Added:
        done, scan = self.done, self.scan
        waiting: dict[str, list[Item]] = {}
        for number, item in enumerate(items, 1):
            progress(number)
            try:
                key = item.key()
            except SearchError as error:
                self._fail([item], str(error))
                continue
            if key in waiting:
                waiting[key].append(item)
            elif key in self.before or key in scan.new:
                done.duplicates += key in scan.names
                done.known += key not in scan.names
                scan.see(key, item)
            else:
                waiting[key] = [item]
            if len(waiting) == ROWS:
                self._add_part(waiting)
                waiting = {}
        self._add_part(waiting)
        return done

    def _fail(self, items: Sequence[Item], reason: str) -> None:
        for item in items:
            self.done.failed.append((item.name, reason))
            # A file that a table names and that is deleted is gone; others may be read again another day.
            if not isinstance(item.image, str | Path) or os.path.lexists(item.image):
                self.unread.add(item.name)

    def _add_part(self, waiting: dict[str, list[Item]]) -> None:
        rows: list[dict[str, Any]] = []
        pictures: list[Any] = []
        embedded: list[np.ndarray] = []
        for key, items in waiting.items():
            first = items[0]
            row: dict[str, Any] = {"key": key, "kind": first.kind, "text": first.text, "image": None}
            if first.image is not None:
                try:
                    picture = read_picture(first.image)
                except SearchError as error:
                    self._fail(items, str(error))
                    continue
                row["image"] = thumbnail(picture)
                pictures.append(picture)
                if sum(one.width * one.height for one in pictures) > _PIXELS:
                    embedded += list(self.encode_image(pictures))
                    pictures = []
            rows.append(row)
        texts = [row["text"] for row in rows if row["kind"] == "text"]
        embedded += list(self.encode_image(pictures)) if pictures else []
        found = {"text": iter(self.encode_text(texts) if texts else ()), "image": iter(embedded)}
        kept = []
        for row in rows:
            row["embedding"] = unit(np.asarray(next(found[row["kind"]]), np.float32))
            items = waiting[row["key"]]
            if not np.isfinite(row["embedding"]).all():
                self._fail(items, "the model gives no finite embedding of it")
                continue
            for item in items:
                self.scan.see(row["key"], item)
            self.scan.new.add(row["key"])
            row["places"] = self.scan.places(row["key"])
            self.done.duplicates += len(items) - 1
            kept.append(row)
        if kept:
            self.wrote(self.table.append(kept))
            self.done.count += len(kept)
