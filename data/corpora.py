"""The registry of public corpora: `data/recipes/corpora.yaml`."""

import difflib
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict

from bifocal.data.source import Source
from bifocal.errors import DataError

REGISTRY = Path(__file__).parent / "recipes" / "corpora.yaml"


class Corpus(BaseModel):
    """A public corpus.

    Args:
        kind: of its rows.
        used: where the paper, or today's practice, has it.
        about: in a sentence.
        id: of its data set on the Hub.
        path: its files, where they are not loaded by the id.
        format, name, split, columns: as of a `Source`.
        rows: about how many.
        licence: as its publisher says.
        download: how to get what is not on the Hub; the source then needs a path of one's own.
        verified: what these facts were checked against.
    """

    model_config = ConfigDict(extra="forbid")
    kind: Literal["image-text", "text-pair", "text-triplet", "text-only"]
    used: str
    about: str
    id: str | None = None
    path: str | None = None
    format: str | None = None
    name: str | None = None
    split: str = "train"
    columns: dict[str, str] = {}
    rows: int
    licence: str
    download: str | None = None
    verified: str

    def source(self, given: Source) -> Source:
        """The source of a recipe that named this corpus, with what the recipe says of it besides."""
        place = self.path or self.id
        if self.download is not None or place is None:
            raise DataError(f"'{given.path}' must be fetched first: {self.download}.")
        own: dict[str, Any] = {
            "path": place, "format": self.format, "name": self.name, "split": self.split, "columns": self.columns,
        }  # fmt: skip
        said = {key: getattr(given, key) for key in given.model_fields_set if key != "path"}
        return Source(**{**own, **said})


@cache
def corpora() -> dict[str, Corpus]:
    """Every corpus by its name."""
    return {name: Corpus(**entry) for name, entry in yaml.safe_load(REGISTRY.read_text(encoding="utf-8")).items()}


def corpus(name: str) -> Corpus:
    """
    Raises:
        DataError: there is none of this name; the nearest is named.
    """
    known = corpora()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        said = f"did you mean '{near[0]}'?" if near else "see bifocal data list."
        raise DataError(f"There is no corpus '{name}'; {said}")
    return known[name]


def listing() -> str:
    """A table of all, one line each."""
    rows = [
        (
            name,
            c.kind,
            f"{c.rows:,}",
            c.licence,
            "not verified" if c.verified.startswith("not verified") else "in part",
            "fetch first" if c.download else (c.path or c.id or ""),
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
    """What is known of one, and the lines that a recipe needs for it."""
    found = corpus(name)
    facts = {
        "kind": found.kind, "used": found.used, "on the Hub": found.id or "no", "rows": f"about {found.rows:,}",
        "licence": found.licence, "verified": found.verified,
    }  # fmt: skip
    lines = [f"{name}: {found.about}", ""] + [f"  {key:<11} {value}" for key, value in facts.items()]
    if found.download is not None:
        return "\n".join([*lines, "", f"To fetch: {found.download}."])
    streaming = ", streaming: true" if found.path else ""
    data = f"data: {{path: corpus:{name}{streaming}}}"
    if found.kind == "text-only":
        return "\n".join([*lines, "", "In a recipe:", "  mlm:", f"    {data}", "    batch_size: 32"])
    task = [f"  - name: {name}", f"    kind: {found.kind}", f"    {data}", "    batch_size: 256"]
    return "\n".join([*lines, "", "In a recipe:", "tasks:", *task])
