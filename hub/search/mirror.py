"""What an index has to change so that it shows a source as it is now."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from bifocal.hub.search.items import Item
from bifocal.hub.search.table import Place

NO_SOURCE = -1


@dataclass
class Origin:
    """The source that items come from. The index remembers it, so that it sees what has changed when it comes again.

    Args:
        identity: equal for the same source, in plain JSON; it stays on this machine.
        options: remembered for the next time.
        complete: whether every item was read. Whoever reads sets it to False where a file or folder was not read to its
            end: what was not seen then counts as unknown, not as gone.
        unread: names that are there, but could not be read; what the index has of them stays.
    """

    identity: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)
    complete: bool = True
    unread: set[str] = field(default_factory=set)


@dataclass
class Added:
    """What adding items changed.

    Args:
        count: new rows.
        known: items whose content was in the index before this run.
        duplicates: items whose content came before in this run; their names and captions are kept with it.
        updated: items of known content with another caption than before.
        renamed: items of known content with another name than before.
        replaced: names that have other content than before; the old content is deleted if it has no other name.
        gone: names in the index that the source no longer has.
        pruned: how many of them were deleted.
        restored: lost parts of the table, whose items are embedded again.
        failed: name and reason of items that cannot be read.
    """

    count: int = 0
    known: int = 0
    duplicates: int = 0
    updated: int = 0
    renamed: int = 0
    replaced: int = 0
    gone: int = 0
    pruned: int = 0
    restored: int = 0
    failed: list[tuple[str, str]] = field(default_factory=list)


class Scan:
    """The items of one run over a source, compared with what the index holds of that source.

    Args:
        source: its number; `NO_SOURCE` for items of no source, of which nothing is ever missed.
    """

    def __init__(self, source: int) -> None:
        self.source = source
        self.names: dict[str, list[str]] = {}  # of each key
        self.texts: dict[tuple[str, str], list[str]] = {}  # of each key and name
        self.holders: dict[tuple[str, str], set[str]] = {}  # keys of each kind and name
        self.own: set[tuple[str, str]] = set()  # kinds and names that are of a file, not the number of a row
        self.new: set[str] = set()  # keys that were not in the index before

    def see(self, key: str, item: Item) -> None:
        text = "" if item.kind == "text" else item.text
        texts = self.texts.setdefault((key, item.name), [])
        if text not in texts:
            texts.append(text)
        names = self.names.setdefault(key, [])
        if item.name not in names:
            names.append(item.name)
        self.holders.setdefault((item.kind, item.name), set()).add(key)
        if item.own_name:
            self.own.add((item.kind, item.name))

    def places(self, key: str) -> list[Place]:
        """Return where content was seen in this run."""
        return [
            Place(self.source, name, text)
            for name in self.names.get(key, ())
            # An empty caption beside others says nothing.
            for text in sorted(self.texts[key, name], key=lambda one: not one)
            if text or not any(self.texts[key, name])
        ]

    def now(
        self, key: str, kind: str, places: Sequence[Place], complete: bool, unread: set[str], prune: bool, done: Added
    ) -> list[Place]:
        """Return a row's places as they are now, and count what changed.

        Args:
            complete, unread: of the origin, see `Origin`.
            prune: drop places that are gone.
        """
        seen = self.places(key)
        fresh = [place for place in seen if place not in places]
        known = {place.name for place in places if place.source == self.source}
        fates = {name: self._fate(key, kind, name, complete, unread) for name in known}
        # As many names as are new to this content were given to it in place of those that it lost.
        renamed = len({place.name for place in fresh} - known)
        for name in dict.fromkeys(place.name for place in places if place.name in known):
            if fates[name] in ("lost", "gone") and key in self.names and renamed:
                renamed -= 1
                done.renamed += 1
                fates[name] = "lost"
            elif fates[name] == "gone":
                done.gone += 1
                done.pruned += prune
            done.replaced += fates[name] == "replaced"
        kept = []
        for place in places:
            fate = "kept" if place.source != self.source else fates[place.name]
            if fate == "kept" or (fate == "seen" and place in seen) or (fate == "gone" and not prune):
                kept.append(place)
        changed = {place.name for place in [*fresh, *(p for p in places if p not in kept)]}
        done.updated += sum(fates[name] == "seen" for name in changed & known)
        order = {name: number for number, name in enumerate(dict.fromkeys(place.name for place in [*places, *fresh]))}
        return sorted([*kept, *fresh], key=lambda place: order[place.name])

    def _fate(self, key: str, kind: str, name: str, complete: bool, unread: set[str]) -> str:
        """Return "seen", "kept", "replaced", "lost" (the content is still there, its name is not), or "gone".

        The number of a row is no name of its own: where a row before it was deleted, it stands for the row after it.
        """
        if (key, name) in self.texts:
            return "seen"
        if self.source == NO_SOURCE or name in unread:
            return "kept"
        holders = self.holders.get((kind, name))
        if not holders:
            return "gone" if complete else "kept"
        if key in self.names:
            return "lost"
        if (kind, name) in self.own:
            return "replaced"
        if not complete:  # the row may come later, with another number
            return "kept"
        return "replaced" if holders & self.new else "gone"
