"""What has to change in an index so that it shows a source as it is now."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from bifocal.embedding.items import Item
from bifocal.hub.search.table import Occurrence

NO_SOURCE = -1


@dataclass
class ItemSource:
    """The source of items. The index remembers it, so that the next run over it shows what has changed.

    Args:
        identity: plain JSON, equal for the same source; it stays on this machine.
        options: options to remember for the next run.
        complete: whether every item was read. The reader sets it to False if a file or folder was not read to its end:
            what was not read then counts as unknown, not as missing.
        unread: names that exist, but could not be read; what the index has of them stays.
    """

    identity: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)
    complete: bool = True
    unread: set[str] = field(default_factory=set)


@dataclass
class AddResult:
    """What a run that adds items changed.

    Args:
        new: new rows.
        known: items whose content was in the index before this run.
        duplicates: items whose content came earlier in this run; their names and captions are kept with it.
        updated: items of known content with another caption than before.
        renamed: items of known content with another name than before.
        replaced: names that have other content than before; the old content is deleted if it has no other name.
        missing: names in the index that the source no longer has.
        pruned: how many of the missing names were deleted.
        restored: lost parts of the table, whose items are embedded again.
        skipped: name and reason of each item that cannot be read.
    """

    new: int = 0
    known: int = 0
    duplicates: int = 0
    updated: int = 0
    renamed: int = 0
    replaced: int = 0
    missing: int = 0
    pruned: int = 0
    restored: int = 0
    skipped: list[tuple[str, str]] = field(default_factory=list)


class SourceScan:
    """The items of one run over a source, compared with what the index holds of that source.

    Args:
        source: number of the source; `NO_SOURCE` for items without one, which are never missing.
    """

    def __init__(self, source: int) -> None:
        self.source = source
        self.names: dict[str, list[str]] = {}  # by key
        self.texts: dict[tuple[str, str], list[str]] = {}  # by key and name
        self.keys: dict[tuple[str, str], set[str]] = {}  # by kind and name
        self.stable: set[tuple[str, str]] = set()  # kind and name of files, not of rows
        self.new_keys: set[str] = set()  # keys that were not in the index before

    def see(self, key: str, item: Item) -> None:
        """Record an item."""
        text = "" if item.kind == "text" else item.text
        texts = self.texts.setdefault((key, item.name), [])
        if text not in texts:
            texts.append(text)
        names = self.names.setdefault(key, [])
        if item.name not in names:
            names.append(item.name)
        self.keys.setdefault((item.kind, item.name), set()).add(key)
        if item.has_stable_name:
            self.stable.add((item.kind, item.name))

    def occurrences(self, key: str) -> list[Occurrence]:
        """Return where content was seen in this run."""
        return [
            Occurrence(self.source, name, text)
            for name in self.names.get(key, ())
            # An empty caption adds nothing to others.
            for text in sorted(self.texts[key, name], key=lambda one: not one)
            if text or not any(self.texts[key, name])
        ]

    def update(
        self, key: str, kind: str, before: Sequence[Occurrence], complete: bool, unread: set[str], prune: bool,
        result: AddResult,
    ) -> list[Occurrence]:  # fmt: skip
        """Return a row's occurrences as they are now, and count what changed.

        Args:
            before: the row's occurrences as they were.
            complete, unread: see `ItemSource`.
            prune: delete occurrences that are missing.
            result: where changes are counted.
        """
        seen = self.occurrences(key)
        new = [occurrence for occurrence in seen if occurrence not in before]
        known = {occurrence.name for occurrence in before if occurrence.source == self.source}
        states = {name: self._state(key, kind, name, complete, unread) for name in known}
        # As many names as are new to this content replaced names that it lost.
        renamed = len({occurrence.name for occurrence in new} - known)
        for name in dict.fromkeys(occurrence.name for occurrence in before if occurrence.name in known):
            if states[name] in ("lost", "missing") and key in self.names and renamed:
                renamed -= 1
                result.renamed += 1
                states[name] = "lost"
            elif states[name] == "missing":
                result.missing += 1
                result.pruned += prune
            result.replaced += states[name] == "replaced"
        kept = []
        for occurrence in before:
            state = "kept" if occurrence.source != self.source else states[occurrence.name]
            if state == "kept" or (state == "seen" and occurrence in seen) or (state == "missing" and not prune):
                kept.append(occurrence)
        changed = {item.name for item in [*new, *(item for item in before if item not in kept)]}
        result.updated += sum(states[name] == "seen" for name in changed & known)
        order = {name: number for number, name in enumerate(dict.fromkeys(item.name for item in [*before, *new]))}
        return sorted([*kept, *new], key=lambda occurrence: order[occurrence.name])

    def _state(self, key: str, kind: str, name: str, complete: bool, unread: set[str]) -> str:
        """Return what happened to a name of some content.

        "seen", "kept" (unknown, so that it stays), "replaced", "lost" (the content exists, under another name) or
        "missing". The number of a row is not a stable name: after a row is deleted, it stands for the next row.
        """
        if (key, name) in self.texts:
            return "seen"
        if self.source == NO_SOURCE or name in unread:
            return "kept"
        keys = self.keys.get((kind, name))
        if not keys:
            return "missing" if complete else "kept"
        if key in self.names:
            return "lost"
        if (kind, name) in self.stable:
            return "replaced"
        if not complete:  # the row may come later, with another number
            return "kept"
        return "replaced" if keys & self.new_keys else "missing"
