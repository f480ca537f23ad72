"""Natural language inference (SNLI, MultiNLI): triplets from premises, entailed sentences and contradictions."""

from collections.abc import Iterator, Mapping
from typing import Any

from bifocal.data.skips import RowError
from bifocal.data.text_files import Reader, Row, numbered, read_json_lines

# gold_label of the SNLI and MultiNLI files, and the numbers that the Hub's copies use instead.
_LABELS = {"entailment": "entailment", "contradiction": "contradiction", 0: "entailment", 2: "contradiction"}


def read_nli(path: str, start: Any = None, triplets: bool = True, read: Reader = read_json_lines) -> Iterator[Row]:
    """Yield the triplets of a file: a premise, one of its entailed sentences, and its contradictions as hard negatives.

    arXiv 2104.08821, section 3.2, takes one of each; here each entailed sentence is a row. The file is held in memory,
    since the lines of a premise may lie far apart. A position is a number of rows.

    Args:
        triplets: skip premises without a contradiction.
        read: reader of the file's lines.
    """
    sentences: dict[str, dict[str, dict[str, str]]] = {}  # by premise and label, with the names of their rows
    bad_rows: list[Row] = []
    for row in read(path, None):
        if isinstance(row.value, RowError):
            bad_rows.append(row)
            continue
        raw = row.value
        premise, sentence = raw.get("sentence1", raw.get("premise")), raw.get("sentence2", raw.get("hypothesis"))
        label = _label(raw.get("gold_label", raw.get("label")))
        if not isinstance(premise, str) or not isinstance(sentence, str):
            bad_rows.append(row._replace(value=RowError("no query", "no premise or no hypothesis")))
        elif label in ("entailment", "contradiction"):
            sentences.setdefault(premise, {}).setdefault(label, {}).setdefault(sentence, row.name)
    yield from numbered([*bad_rows, *_triplets(sentences, triplets)], start)


def _label(value: Any) -> str | None:
    if isinstance(value, str) and value.isdigit():
        value = int(value)
    return _LABELS.get(value) if isinstance(value, str | int | float) else None


def _triplets(sentences: Mapping[str, Mapping[str, Mapping[str, str]]], triplets: bool) -> Iterator[Row]:
    for premise, by_label in sentences.items():
        negatives = list(by_label.get("contradiction", ()))
        if triplets and not negatives:
            continue
        for positive, name in by_label.get("entailment", {}).items():
            yield Row(None, name, {"query": premise, "positive": positive, "negatives": negatives})
