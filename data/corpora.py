"""The registry of public corpora, `data/recipes/corpora.yaml`."""

from functools import cache
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict

from bifocal.data.kinds import CorpusKind
from bifocal.data.source import Source
from bifocal.errors import DataError, closest_name

REGISTRY = Path(__file__).parent / "recipes" / "corpora.yaml"


class Corpus(BaseModel):
    """A public corpus.

    Args:
        kind: kind of its rows.
        usage: stage of the paper, or today's practice, that uses it.
        description: what it holds, in a sentence.
        dataset_id: Hub id of its data set.
        path: its files, if they are not loaded by the id.
        format, name, split, column_mapping: as in `Source`.
        num_rows: approximate number of rows.
        licence: licence that its publisher states.
        download: how to get files that are not on the Hub; a source then names their path.
        verified: what these facts were checked against.
    """

    model_config = ConfigDict(extra="forbid")
    kind: CorpusKind
    usage: str
    description: str
    dataset_id: str | None = None
    path: str | None = None
    format: str | None = None
    name: str | None = None
    split: str = "train"
    column_mapping: dict[str, str] = {}
    num_rows: int
    licence: str
    download: str | None = None
    verified: str

    def source(self, requested: Source) -> Source:
        """Return the source of this corpus, with the other keys that a recipe sets."""
        path = self.path or self.dataset_id
        if self.download is not None or path is None:
            raise DataError(f"'{requested.path}' must be downloaded first: {self.download}.")
        own: dict[str, Any] = {
            "path": path, "format": self.format, "name": self.name, "split": self.split,
            "column_mapping": self.column_mapping,
        }  # fmt: skip
        settings = {key: getattr(requested, key) for key in requested.model_fields_set if key != "path"}
        return Source(**{**own, **settings})


@cache
def corpora() -> dict[str, Corpus]:
    """Return every corpus by its name."""
    return {name: Corpus(**entry) for name, entry in yaml.safe_load(REGISTRY.read_text(encoding="utf-8")).items()}


def corpus(name: str) -> Corpus:
    """Return a corpus by its name.

    Raises:
        DataError: if there is no corpus of this name; it suggests the closest one.
    """
    known = corpora()
    if name not in known:
        closest = closest_name(name, known)
        hint = f"did you mean '{closest}'?" if closest else "see `bifocal data list`."
        raise DataError(f"There is no corpus '{name}'; {hint}")
    return known[name]


def listing() -> str:
    """Return a table of all corpora, one line each."""
    rows = [
        (
            name,
            c.kind,
            f"{c.num_rows:,}",
            c.licence,
            "not verified" if c.verified.startswith("not verified") else "in part",
            "download first" if c.download else (c.path or c.dataset_id or ""),
        )
        for name, c in corpora().items()
    ]
    header = ("corpus", "kind", "rows, about", "licence", "verified", "from")
    widths = [max(len(row[n]) for row in [header, *rows]) for n in range(5)]
    lines = []
    for row in [header, *rows]:
        cells = [row[n].rjust(widths[n]) if n == 2 else row[n].ljust(widths[n]) for n in range(5)]
        lines.append("  ".join([*cells, row[5]]).rstrip())
    return "\n".join(lines)


def explained(name: str) -> str:
    """Return what is known about a corpus, and the lines that a recipe needs for it."""
    entry = corpus(name)
    facts = {
        "kind": entry.kind, "used": entry.usage, "on the Hub": entry.dataset_id or "no",
        "rows": f"about {entry.num_rows:,}",
        "licence": entry.licence, "verified": entry.verified,
    }  # fmt: skip
    lines = [f"{name}: {entry.description}", ""] + [f"  {key:<11} {value}" for key, value in facts.items()]
    if entry.download is not None:
        return "\n".join([*lines, "", f"To download: {entry.download}."])
    streaming = ", streaming: true" if entry.path else ""
    data = f"data: {{path: corpus:{name}{streaming}}}"
    if entry.kind == "text-only":
        return "\n".join([*lines, "", "In a recipe:", "  mlm:", f"    {data}", "    batch_size: 32"])
    task = [f"  - name: {name}", f"    kind: {entry.kind}", f"    {data}", "    batch_size: 256"]
    return "\n".join([*lines, "", "In a recipe:", "tasks:", *task])
