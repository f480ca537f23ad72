"""The registry of public corpora, `data/recipes/corpora.yaml`."""

from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field

from bifocal.data.kinds import CorpusKind
from bifocal.data.source import Source
from bifocal.errors import DataError, closest_name

REGISTRY = Path(__file__).parent / "recipes" / "corpora.yaml"
NUMBERED = "negative_*"  # in `columns`: hard negatives in columns negative_1, negative_2, ..., which need no mapping
_UNKNOWN_LICENCE = ("none stated", "not confirmed")
_NON_COMMERCIAL = ("-NC", "non-commercial")


class Corpus(BaseModel):
    """A public corpus.

    Args:
        kind: kind of its rows.
        description: what it holds, in a sentence.
        dataset_id: Hub id of its data set.
        path: its files, if they are not loaded by the id.
        format, name, split, num_negatives: as in `Source`.
        splits: rows of each split, if a data set is several corpora: each split is a corpus NAME-SPLIT.
        columns: the data set's column for each of ours; none if `format` knows them.
        num_rows: number of rows of the split; None if no source showed it.
        rows_rounded: whether the number of rows is rounded.
        licence: licence that its publisher states; "none stated" if the card was read and states none, "not confirmed"
            if no statement was seen.
        languages: ISO 639 codes; "mul" means many.
        gated: whether the Hub asks for a login and for consent.
        unconfirmed: which of its facts no source showed, or only for another copy.
        download: how to get files that cannot be loaded by the id; a source then names their path.
        source: where these facts were seen.
    """

    model_config = ConfigDict(extra="forbid")
    kind: CorpusKind
    description: str
    dataset_id: str | None = None
    path: str | None = None
    format: str | None = None
    name: str | None = None
    split: str = "train"
    splits: dict[str, Annotated[int, Field(ge=1)]] = {}
    columns: dict[str, str] = {}
    num_negatives: int | None = None
    num_rows: Annotated[int, Field(ge=1)] | None = None
    rows_rounded: bool = False
    licence: str
    languages: list[str] = []
    gated: bool = False
    unconfirmed: list[Literal["columns", "rows"]] = []
    download: str | None = None
    source: str

    @property
    def licence_known(self) -> bool:
        """Whether its publisher states a licence."""
        return not self.licence.startswith(_UNKNOWN_LICENCE)

    @property
    def non_commercial(self) -> bool:
        """Whether its licence forbids commercial use."""
        return any(sign in self.licence for sign in _NON_COMMERCIAL)

    @property
    def rows_title(self) -> str:
        """Return the number of rows for a table: "~" marks one that is rounded or not confirmed."""
        if self.num_rows is None:
            return "?"
        return f"{'~' if self.rows_rounded or 'rows' in self.unconfirmed else ''}{self.num_rows:,}"

    def to_source(self, requested: Source) -> Source:
        """Return the source of this corpus, with the other keys that a recipe sets."""
        path = self.path or self.dataset_id
        if self.download is not None or path is None:
            raise DataError(f"'{requested.path}' must be downloaded first: {self.download}.")
        mapping = {theirs: ours for ours, theirs in self.columns.items() if theirs != NUMBERED}
        own: dict[str, Any] = {
            "path": path, "format": self.format, "name": self.name, "split": self.split,
            "column_mapping": mapping, "num_negatives": self.num_negatives,
        }  # fmt: skip
        settings = {key: getattr(requested, key) for key in requested.model_fields_set if key != "path"}
        return Source(**{**own, **settings})


@cache
def corpora() -> dict[str, Corpus]:
    """Return every corpus by its name."""
    entries = _entries()
    return {name: part for entry in entries for name, part in _parts(entry, entries[entry])}


@cache
def _entries() -> dict[str, Corpus]:
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the one in C reads ten times as fast
    values = yaml.load(REGISTRY.read_text(encoding="utf-8"), Loader=loader)
    return {name: Corpus(**entry) for name, entry in values.items()}


def _parts(name: str, entry: Corpus) -> Iterator[tuple[str, Corpus]]:
    """Yield a corpus with its name, or each split of one that is several."""
    if not entry.splits:
        yield name, entry
    for split, rows in entry.splits.items():
        title = split.replace("_", "-")
        changes: dict[str, Any] = {"split": split, "splits": {}, "num_rows": rows}
        changes["description"] = f"{entry.description.removesuffix('.')}: {title.replace('-', ' ')}."
        if not entry.languages:  # its splits are languages
            changes["languages"] = [split]
        yield f"{name}-{title}", entry.model_copy(update=changes)


def corpus(name: str) -> Corpus:
    """Return a corpus by its name.

    Raises:
        DataError: if there is no corpus of this name; it suggests the closest one.
    """
    known = corpora()
    if name not in known:
        raise DataError(f"There is no corpus '{name}'; {corpus_hint(name)}")
    return known[name]


def corpus_hint(name: str, others: Iterable[str] = ()) -> str:
    """Return the end of a sentence on an unknown corpus: the one that may be meant, or where they are listed.

    Args:
        others: further names that may be meant.
    """
    entry = _entries().get(name)
    if entry is not None and entry.splits:
        return f"it is several, such as '{next(iter(_parts(name, entry)))[0]}'."
    closest = closest_name(name, [*corpora(), *others])
    return f"did you mean '{closest}'?" if closest else "see `bifocal data list`."


def listing(kind: str | None = None, language: str | None = None, licence: str | None = None) -> str:
    """Return a table of corpora by kind, one line each.

    Args:
        kind: only corpora of this kind.
        language: only corpora in this language, an ISO 639 code.
        licence: only corpora whose licence has this text in it, in any case; "stated" for all that state one.

    Raises:
        DataError: if there is no such corpus.
    """
    chosen = {
        name: c for name, c in corpora().items()
        if (kind is None or c.kind == kind)
        and (language is None or language.lower() in c.languages)
        and (licence is None or _has_licence(c, licence))
    }  # fmt: skip
    if not chosen:
        raise DataError("No corpus fits. Remove one of --kind, --language and --licence.")
    header = ("corpus", "rows", "licence", "languages", "from")
    rows = {
        name: (name, c.rows_title, short_licence(c), " ".join(c.languages),
               "download first" if c.download else f"{c.dataset_id}{', gated' if c.gated else ''}")
        for name, c in chosen.items()
    }  # fmt: skip
    lines = aligned([header, *rows.values()], right=(1,))
    titled = dict(zip(rows, lines[1:], strict=True))
    sections = [lines[0]]
    for each in dict.fromkeys(c.kind for c in chosen.values()):
        members = [titled[name] for name, c in chosen.items() if c.kind == each]
        sections += ["", f"{each} ({len(members)})", *members]
    return "\n".join([*sections, "", "~ rounded or not confirmed, ? not known. `bifocal data show NAME` says more."])


def _has_licence(entry: Corpus, text: str) -> bool:
    return entry.licence_known if text == "stated" else text.lower() in short_licence(entry).lower()


def short_licence(entry: Corpus) -> str:
    """Return a corpus's licence without what follows in brackets, for a table."""
    return entry.licence.partition(" (")[0]


def aligned(rows: Sequence[Sequence[str]], right: tuple[int, ...] = ()) -> list[str]:
    """Return rows as lines with aligned columns.

    Args:
        right: numbers of the columns that are aligned to the right.
    """
    widths = [max(len(row[n]) for row in rows) for n in range(len(rows[0]))]
    return [
        "  ".join(cell.rjust(width) if n in right else cell.ljust(width)
                  for n, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip()
        for row in rows
    ]  # fmt: skip


def explained(name: str) -> str:
    """Return what is known about a corpus, and the lines that a recipe needs for it."""
    entry = corpus(name)
    columns = ", ".join(f"{ours}: {theirs}" for ours, theirs in entry.columns.items())
    facts = {
        "kind": entry.kind, "data set": entry.dataset_id or "not on the Hub", "name": entry.name,
        "split": entry.split if entry.download is None else None,
        "columns": columns or (f"by the format {entry.format}" if entry.format else None),
        "rows": "not known" if entry.num_rows is None else entry.rows_title.replace("~", "about "),
        "licence": entry.licence, "languages": ", ".join(entry.languages),
        "gated": "yes: accept its terms on the Hub and log in (hf auth login)" if entry.gated else "no",
        "loading": _loading(entry), "seen in": entry.source,
        "unconfirmed": ", ".join(entry.unconfirmed) or None,
    }  # fmt: skip
    lines = [f"{name}: {entry.description}", ""] + [f"  {key:<11} {value}" for key, value in facts.items() if value]
    if entry.download is not None:
        return "\n".join([*lines, "", f"To download: {entry.download}."])
    streaming = ", streaming: true" if entry.path else ""
    data = f"data: {{path: corpus:{name}{streaming}}}"
    if entry.kind == "text-only":
        return "\n".join([*lines, "", "In a recipe:", "  mlm:", f"    {data}", "    batch_size: 32"])
    task = [f"  - name: {name}", f"    kind: {entry.kind}", f"    {data}", "    batch_size: 256"]
    return "\n".join([*lines, "", "In a recipe:", "tasks:", *task])


def _loading(entry: Corpus) -> str:
    if entry.download is not None:
        return "after a download"
    return "its files, streamed or not" if entry.path else "by `datasets`, without a loading script; streamed or not"
