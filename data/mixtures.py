"""Mixtures of public corpora with sampling weights; `data/recipes/mixtures.yaml` holds those that come with Bifocal."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

from bifocal.data.corpora import Corpus, aligned, corpora, corpus, corpus_hint, short_licence
from bifocal.data.filters import Cleaning
from bifocal.data.kinds import TaskKind
from bifocal.data.schema import Strict
from bifocal.data.source import Source
from bifocal.errors import DataError, closest_name

MIXTURES = Path(__file__).parent / "recipes" / "mixtures.yaml"
# The kinds of corpora that can be read as the kind of a task; of triplets, a task of pairs reads query and positive.
_READ_AS = {"text-pair": ("text-pair", "text-triplet")}
_NAMED = 6  # corpora in a warning
Weights = dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]]


class ShippedMixture(BaseModel):
    """A mixture that comes with Bifocal.

    Args:
        kind: kind of the tasks that it is for.
        description: what it is for, in a sentence.
        weights: as in `Mixture`.
    """

    model_config = ConfigDict(extra="forbid")
    kind: TaskKind
    description: str
    weights: Weights


class Mixture(Strict):
    """Public corpora with sampling weights: one task for each, with its name. A batch comes from one of them.

    Args:
        name: a mixture that comes with Bifocal, from `bifocal data list`.
        weights: sampling weight of each corpus, or those that differ from the named mixture's; 0 removes a corpus. A
            corpus is drawn in proportion to its rows in the registry times its weight.
        streaming, limit, num_negatives, clean, max_bad_fraction: as in `Source`, for each corpus.
    """

    name: str | None = None
    weights: Weights = {}
    streaming: bool = False
    limit: Annotated[int, Field(ge=1)] | None = None
    num_negatives: Annotated[int, Field(ge=1)] | None = None
    clean: Cleaning | None = None
    max_bad_fraction: Annotated[float, Field(ge=0, le=1)] = 0.01

    @model_validator(mode="after")
    def _require_usable_corpora(self) -> "Mixture":
        for name, weight in self.weights.items():
            if name not in corpora():
                raise ValueError(f"weights: there is no corpus '{name}'; {corpus_hint(name)}")
            if weight:
                _require_usable(name, corpora()[name])
        if not any(self.all_weights.values()):
            raise ValueError("a mixture needs name, or weights of which one is above 0")
        return self

    @property
    def all_weights(self) -> dict[str, float]:
        """Return the weight of each corpus, of the named mixture included."""
        shipped = {} if self.name is None else shipped_mixture(self.name).weights
        return {**shipped, **self.weights}

    def members(self, kind: str) -> list["Member"]:
        """Return the corpora whose weight is above 0.

        Raises:
            DataError: if a corpus cannot be read as this kind.
        """
        members = [
            Member(name, corpus(name), weight, self.limit) for name, weight in self.all_weights.items() if weight
        ]
        for member in members:
            fits = _READ_AS.get(kind, (kind,))
            if member.corpus.kind not in fits:
                raise DataError(f"mixture: '{member.name}' holds {member.corpus.kind} rows, but the task reads {kind}.")
        return members

    def source(self, member: "Member") -> Source:
        """Return where the rows of a corpus of this mixture come from."""
        settings = self.model_dump(exclude={"name", "weights"}, exclude_unset=True)
        return Source(path=f"corpus:{member.name}", **settings)


@dataclass(frozen=True)
class Member:
    """A corpus of a mixture.

    Args:
        weight: its sampling weight.
        limit: maximum number of its rows.
    """

    name: str
    corpus: Corpus
    weight: float
    limit: int | None = None

    @property
    def rows(self) -> int:
        """Return the number of rows that are read, by the registry."""
        rows = self.corpus.num_rows or 0
        return rows if self.limit is None else min(rows, self.limit)


def shares(members: Sequence[Member]) -> list[float]:
    """Return the share of the batches that each corpus is drawn for: rows times weight, over their sum."""
    drawn = [member.rows * member.weight for member in members]
    return [value / sum(drawn) for value in drawn]


@cache
def shipped_mixtures() -> dict[str, ShippedMixture]:
    """Return the mixtures that come with Bifocal, by name."""
    values: dict[str, Any] = yaml.safe_load(MIXTURES.read_text(encoding="utf-8"))
    return {name: ShippedMixture(**entry) for name, entry in values.items()}


def shipped_mixture(name: str) -> ShippedMixture:
    """Return a mixture that comes with Bifocal.

    Raises:
        DataError: if there is no mixture of this name.
    """
    known = shipped_mixtures()
    if name not in known:
        closest = closest_name(name, known)
        hint = f"did you mean '{closest}'?" if closest else f"use one of {', '.join(known)}."
        raise DataError(f"there is no mixture '{name}'; {hint}")
    return known[name]


def _require_usable(name: str, entry: Corpus) -> None:
    if entry.download is not None:
        raise ValueError(f"weights: '{name}' must be downloaded first; give it a task of its own, with data")
    if entry.num_rows is None:
        raise ValueError(
            f"weights: the rows of '{name}' are not known, so it has no share; give it a task of its own, with num_rows"
        )


def mixture_table(members: Sequence[Member], rows_drawn: float | None = None) -> str:
    """Return a table of a mixture: kind, rows, weight, share and licence of each corpus, their sums, and warnings.

    Args:
        rows_drawn: rows of all batches of a stage; the table then says how often each corpus is passed through.
    """
    header = ["corpus", "kind", "rows", "weight", "share", "licence", "languages"]
    table = []
    for member, share in zip(members, shares(members), strict=True):
        entry = member.corpus
        rows = entry.rows_title if member.rows == entry.num_rows else f"{member.rows:,}"
        row = [member.name, entry.kind, rows, f"{member.weight:g}", f"{share:.2%}", short_licence(entry),
               " ".join(entry.languages)]  # fmt: skip
        table.append(row if rows_drawn is None else [*row, f"{rows_drawn * share / member.rows:.1f}"])
    total = [f"{len(members)} corpora", "", f"{sum(member.rows for member in members):,}", "", "100.00%", "", ""]
    if rows_drawn is not None:
        header, total = [*header, "passes"], [*total, ""]
    lines = aligned([header, *table, total], right=(2, 3, 4, 7))
    return "\n".join([*lines, "", *_warnings(members)]).rstrip()


def _warnings(members: Sequence[Member]) -> list[str]:
    """Return what should be known before training on a mixture."""
    cases = {
        "Not for commercial use": lambda entry: entry.non_commercial,
        "Need a login and consent on the Hub": lambda entry: entry.gated,
        "No licence stated or seen, read their cards": lambda entry: not entry.licence_known,
        "Rows rounded or not confirmed, and with them their shares": lambda entry: entry.rows_title.startswith("~"),
        "Columns not confirmed": lambda entry: "columns" in entry.unconfirmed,
    }
    lines = []
    for title, case in cases.items():
        names = [member.name for member in members if case(member.corpus)]
        if names:
            listed = ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")
            lines.append(f"{title} ({len(names)}): {listed}.")
    return lines


def mixture_list() -> str:
    """Return the mixtures that come with Bifocal, one line each."""
    rows = [(name, shipped.kind, f"{len(shipped.weights)} corpora") for name, shipped in shipped_mixtures().items()]
    return "\n".join(["mixtures", *aligned(rows)])


def explained_mixture(name: str) -> str:
    """Return what a mixture that comes with Bifocal holds, and the lines that a recipe needs for it."""
    shipped = shipped_mixture(name)
    members = Mixture(name=name).members(shipped.kind)
    first = members[0].name
    task = [f"  - name: {name}", f"    kind: {shipped.kind}",
            f"    mixture: {{name: {name}, streaming: true, weights: {{{first}: 0}}}}   # weights: changes, 0 removes",
            "    batch_size: 256"]  # fmt: skip
    return "\n".join(
        [f"{name}: {shipped.description}", "", mixture_table(members), "", "In a recipe:", "tasks:", *task]
    )
