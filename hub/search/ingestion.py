"""One run that embeds items and writes them to the table, part by part."""

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bifocal.embedding.items import Item, ItemError
from bifocal.hub.search.sync import AddResult, SourceScan
from bifocal.hub.search.table import ROWS, Table

if TYPE_CHECKING:  # it imports torch
    from bifocal.embedding.embed import EmbeddedItem

Embed = Callable[[Sequence[Item]], "list[EmbeddedItem]"]


class Ingestion:
    """A run over items, which embeds and writes those that are not in the table and shows each one to the scan.

    Args:
        table: table to add to; the caller holds its index's lock.
        known_keys: keys in the table before the run.
        scan: is shown every item that is in the table or is written to it.
        embed: embeds items, see `embed_items`.
        on_part_written: called with the number of parts after each new part.
    """

    def __init__(
        self, table: Table, known_keys: set[str], scan: SourceScan, embed: Embed, on_part_written: Callable[[int], None]
    ) -> None:
        self.table, self.known_keys, self.scan, self.on_part_written = table, known_keys, scan, on_part_written
        self.embed = embed
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
            except ItemError as error:
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
        embedded = self.embed([items[0] for items in waiting.values()])
        for (key, items), result in zip(waiting.items(), embedded, strict=True):
            if result.vector is None:
                self._skip(items, result.error)
                continue
            for item in items:
                self.scan.see(key, item)
            self.scan.new_keys.add(key)
            self.result.duplicates += len(items) - 1
            rows.append(
                {"key": key, "kind": items[0].kind, "text": items[0].text, "image": result.thumbnail,
                 "embedding": result.vector, "occurrences": self.scan.occurrences(key)}
            )  # fmt: skip
        if rows:
            self.on_part_written(self.table.append(rows))
            self.result.new += len(rows)
