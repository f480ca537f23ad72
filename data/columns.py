"""Checks that a source has the columns that a kind of rows needs, and suggests one for each that is missing."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bifocal.data.kinds import KINDS
from bifocal.data.normalize import NAMES, RowNormaliser, has_column
from bifocal.data.readers import IMAGE_SUFFIXES
from bifocal.data.source import Source
from bifocal.errors import DataError, closest_name

# Suggestions besides the names that need no mapping; the likeliest first.
_SYNONYMS: dict[str, tuple[str, ...]] = {
    "image": ("img", "picture", "photo", "filename", "file", "image_file", "image_url", "url", "jpg", "png"),
    "caption": ("title", "description", "alt", "alt_text", "sentence", "sentences", "label", "prompt", "raw", "tags"),
    "query": ("sentence1", "text1", "title", "premise", "prompt", "instruction", "input", "search", "text"),
    "positive": ("sentence2", "text2", "answers", "answer_text", "passage", "document", "context", "body", "response",
                 "abstract", "hypothesis", "output", "target", "pos", "text"),
    "negatives": ("neg", "negs", "hard_negative", "hard_negatives", "distractor", "distractors"),
    "text": ("content", "sentence", "document", "body", "passage", "article", "caption", "title", "description"),
    "label": ("category", "target", "species", "kind", "type", "name", "tag", "y"),
    "first": ("sentence_a", "sentence_1", "anchor", "query", "question1", "premise", "text_a"),
    "second": ("sentence_b", "sentence_2", "positive", "answer", "question2", "hypothesis", "text_b"),
    "score": ("similarity", "similarity_score", "relatedness", "relatedness_score", "rating", "gold"),
}  # fmt: skip
_WHAT = {"image": "images", "score": "numbers", "label": "labels"}
_ID = re.compile(r"(^|_)(id|idx|index|uuid|uid|guid|key|hash|md5|sha\d*)$", re.IGNORECASE)
_NUMBER = re.compile(r"\s*[-+]?\d+([.,]\d+)*([eE][-+]?\d+)?\s*$")
_ADDRESS = re.compile(r"\s*[a-z]+://\S+\s*$", re.IGNORECASE)
_IMAGE_FILE = re.compile(rf"\S.*\.({'|'.join(IMAGE_SUFFIXES)})(\?\S*)?\s*$", re.IGNORECASE)


class MissingColumnError(DataError):
    """A column is missing in a source.

    Args:
        names: names of the columns that it has.
    """

    def __init__(self, message: str, names: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.names = list(names)


def require_columns(names: list[str] | None, source: Source, kind: str, rows: Sequence[Mapping[str, Any]] = ()) -> None:
    """Require that a source has the columns that its mapping names and the kind needs.

    Args:
        names: names of the source's columns; None if they are only known when it is read.
        rows: some of its rows, used to suggest a column.

    Raises:
        MissingColumnError: if a column is missing, or two have the same name.
    """
    if names is None:
        return
    has = ", ".join(names)
    for ours, theirs in source.mapped_columns.items():
        if theirs not in names and theirs.partition(".")[0] not in names:
            closest = closest_name(theirs, names)
            meant = f"; did you mean column_mapping.{closest}={ours}?" if closest else "; correct column_mapping."
            raise MissingColumnError(f"'{source.title}' has no column '{theirs}' (it has {has}){meant}", names)
    steps = RowNormaliser(kind, source.mapped_columns)
    columns = {ours: steps.column_of(ours, names) for ours in KINDS[kind]}
    for ours, column in columns.items():
        if ours not in source.mapped_columns and column is None and not has_column(ours, names):
            taken = [name for name in columns.values() if name is not None]
            hint = column_hint(ours, names, rows, taken)
            raise MissingColumnError(f"'{source.title}' has no column '{ours}' (it has {has}){hint}.", names)
        if ours not in source.mapped_columns and f"{column}.1" in names:
            raise MissingColumnError(
                f"'{source.title}' has two columns '{column}' (the second is read as '{column}.1'); choose one "
                f"with column_mapping, such as column_mapping.{column}.1={ours}.",
                names,
            )


def column_hint(ours: str, names: Sequence[str], rows: Sequence[Mapping[str, Any]], taken: Iterable[str] = ()) -> str:
    """Return the end of a sentence on a missing column: one that may be meant, or that none looks like it.

    Args:
        ours: the column that a kind needs.
        names: names of the source's columns.
        rows: some of its rows; without them only the names are judged.
        taken: columns that are already read as another column.
    """
    free = [name for name in names if name not in taken]
    known = [*NAMES[ours], *_SYNONYMS.get(ours, ())]

    def rank(column: str) -> int:
        plain = column.lower().replace("-", "_").replace(" ", "_")
        words = plain.split("_")
        exact = [number for number, name in enumerate(known) if name == plain]
        within = [len(known) + number for number, name in enumerate(known) if len(name) > 2 and name in words]
        return min(exact + within, default=10_000)

    fits = {name: _fits(ours, name, [row.get(name) for row in rows]) for name in free}
    fitting = [name for name in free if fits[name] is True or (fits[name] is None and rank(name) < 10_000)]
    if not fitting:
        return f"; none of them looks like {_WHAT.get(ours, 'texts')}"
    return f"; set column_mapping, such as column_mapping.{min(fitting, key=rank)}={ours}"


def _fits(ours: str, name: str, values: list[Any]) -> bool | None:
    """Return whether a column may hold what is wanted, by its values; None without values."""
    values = [value[0] if isinstance(value, list) and value else value for value in values]
    values = [value for value in values if value not in (None, "", [])]
    if not values:
        return None
    test = {"image": _is_image, "score": _is_number, "label": _is_label}.get(ours, _is_text)
    return (ours == "image" or not _ID.search(name)) and sum(map(test, values)) > len(values) / 2


def _is_image(value: Any) -> bool:
    if isinstance(value, Mapping):
        return {"bytes", "path"} & set(value) != set()
    return isinstance(value, bytes) or (isinstance(value, str) and bool(_IMAGE_FILE.match(value)))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) or (isinstance(value, str) and bool(_NUMBER.match(value)))


def _is_label(value: Any) -> bool:
    return isinstance(value, int) or (isinstance(value, str) and len(value) < 100 and not _IMAGE_FILE.match(value))


def _is_text(value: Any) -> bool:
    """Return whether a value is text, but not a number, an address or the path of an image."""
    return (
        isinstance(value, str) and any(map(str.isalpha, value))
        and not (_NUMBER.match(value) or _ADDRESS.match(value) or _IMAGE_FILE.match(value))
    )  # fmt: skip
