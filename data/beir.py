"""Layouts whose rows are made of several lines: BEIR folders and natural language inference."""

import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from bifocal.data.delimited import read_csv
from bifocal.data.normalize import passage
from bifocal.data.shards import read_on
from bifocal.data.skips import Fault
from bifocal.data.text_files import Reader, Row, lost, read_json_lines

_NUMBER = re.compile(r"-?\d+(\.\d*)?")
# gold_label of the SNLI and MultiNLI files, and the numbers that the Hub's copies have for them.
_LABELS = {"entailment": "entailment", "contradiction": "contradiction", 0: "entailment", 2: "contradiction"}


def read_nli(path: str, start: Any = None, triplets: bool = True, read: Reader = read_json_lines) -> Iterator[Row]:
    """A file of SNLI or MultiNLI as triplets: for each premise its entailed sentences as positives, its contradictions
    as hard negatives (arXiv 2104.08821, section 3.2 has one of each; here each entailed sentence is a row).

    The file is held in memory, since the lines of a premise may lie far apart. A position is a number of rows.

    Args:
        triplets: leave out premises without a contradiction.
        read: the lines of the file.
    """
    groups: dict[
        str, dict[str, dict[str, str]]
    ] = {}  # by premise and label, the sentences with the names of their rows
    faults: list[Row] = []
    for row in read(path, None):
        if isinstance(row.value, Fault):
            faults.append(row)
            continue
        raw = row.value
        premise, sentence = raw.get("sentence1", raw.get("premise")), raw.get("sentence2", raw.get("hypothesis"))
        label = _label(raw.get("gold_label", raw.get("label")))
        if not isinstance(premise, str) or not isinstance(sentence, str):
            faults.append(row._replace(value=Fault("no query", "no premise or no hypothesis")))
        elif label in ("entailment", "contradiction"):
            groups.setdefault(premise, {}).setdefault(label, {}).setdefault(sentence, row.name)
    yield from _numbered([*faults, *_triplets(groups, triplets)], start)


def _numbered(rows: Iterable[Row], start: Any) -> Iterator[Row]:
    """The rows from a position on, each with the position after it."""
    for number, row in islice(enumerate(rows, 1), start or 0, None):
        yield row._replace(position=number)


def _label(value: Any) -> str | None:
    if isinstance(value, str) and value.isdigit():
        value = int(value)
    return _LABELS.get(value) if isinstance(value, str | int | float) else None


def _triplets(groups: Mapping[str, Mapping[str, Mapping[str, str]]], triplets: bool) -> Iterator[Row]:
    for premise, found in groups.items():
        against = list(found.get("contradiction", ()))
        if triplets and not against:
            continue
        for positive, name in found.get("entailment", {}).items():
            yield Row(None, name, {"query": premise, "positive": positive, "negatives": against})


def is_beir(folder: str) -> bool:
    return all(_either(Path(folder), name) for name in ("corpus", "queries"))


def _either(folder: Path, name: str) -> Path | None:
    return next((p for p in (folder / f"{name}.jsonl", folder / f"{name}.jsonl.gz") if p.exists()), None)


def _judgements(path: str, start: Any = None) -> Iterator[Row]:
    """Yield rows with `query-id`, `corpus-id` and `score`, of a file with or without a line of these names."""
    names = ("query-id", "corpus-id", "score")
    for row in read_csv(path, header=names, tabs=True):
        if isinstance(row.value, Fault):
            yield row
            continue
        score = row.value["score"].strip()
        if _NUMBER.fullmatch(score):
            yield row._replace(value={**row.value, "score": float(score)})
        elif not row.name.endswith(":1"):
            yield row._replace(value=Fault("broken judgement", f"the score {score[:50]!r} is no number"))


def read_beir(folder: str, start: Any = None, split: str = "train") -> Iterator[Row]:
    """A BEIR folder (arXiv 2104.08663): each judged relevant passage is a positive of its query.

    Of the corpus only judged passages are held in memory. A position is a number of rows.

    Args:
        split: which file of `qrels`.
    """
    root = Path(folder)
    judgements = root / "qrels" / f"{split}.tsv"
    if not judgements.exists():
        there = ", ".join(sorted(path.stem for path in (root / "qrels").glob("*.tsv"))) or "none"
        error = FileNotFoundError(f"no judgements '{judgements}' (splits that are there: {there})")
        yield Row(None, f"{root.name}/qrels/{split}.tsv", lost(error))
        return
    relevant, faults = _relevant(judgements)
    texts: dict[str, dict[str, str]] = {}
    for name, wanted in (("queries", {q for _, q, _ in relevant}), ("corpus", {d for _, _, d in relevant})):
        texts[name] = {}
        for row in read_on(read_json_lines, str(_either(root, name))):
            if isinstance(row.value, Fault):
                faults.append(row)
            elif str(row.value.get("_id")) in wanted:
                texts[name][str(row.value["_id"])] = passage(row.value)
    yield from _numbered([*faults, *_judged(relevant, texts)], start)


def whole_beir(
    folder: str, split: str = "test"
) -> tuple[dict[str, str], dict[str, str], dict[str, list[str]], list[tuple[str, Fault]]]:
    """Queries, the whole corpus, the ids of the relevant passages of each judged query, and faulty lines by name.

    Raises:
        DataError: no judgements of this split.
    """
    from bifocal.errors import DataError

    judgements = Path(folder) / "qrels" / f"{split}.tsv"
    if not judgements.exists():
        there = ", ".join(sorted(path.stem for path in judgements.parent.glob("*.tsv"))) or "none"
        raise DataError(f"'{folder}' has no judgements of the split '{split}' (there are {there}).")
    relevant, rows = _relevant(judgements)
    texts: dict[str, dict[str, str]] = {}
    for name in ("queries", "corpus"):
        texts[name] = {}
        for row in read_on(read_json_lines, str(_either(Path(folder), name))):
            if isinstance(row.value, Fault):
                rows.append(row)
            elif "_id" not in row.value:
                rows.append(row._replace(value=Fault("no _id", ", ".join(map(str, row.value)))))
            else:
                texts[name][str(row.value["_id"])] = passage(row.value)
    faults = [(row.name, row.value) for row in rows if isinstance(row.value, Fault)]
    right: dict[str, list[str]] = {}
    for name, query, document in relevant:
        missing = next((i for i, t in ((query, "queries"), (document, "corpus")) if i not in texts[t]), None)
        if missing is None:
            right.setdefault(query, []).append(document)
        else:
            faults.append((name, Fault("judgement of a missing text", f"'{missing}'")))
    return {query: texts["queries"][query] for query in right}, texts["corpus"], right, faults


def _relevant(judgements: Path) -> tuple[list[tuple[str, str, str]], list[Row]]:
    """(name of the row, query, relevant passage), and the rows that cannot be read."""
    relevant: list[tuple[str, str, str]] = []
    faults: list[Row] = []
    for row in read_on(_judgements, str(judgements)):
        if isinstance(row.value, Fault):
            faults.append(row)
        elif row.value["score"] > 0:
            relevant.append((row.name, row.value["query-id"], row.value["corpus-id"]))
    return relevant, faults


def _judged(relevant: list[tuple[str, str, str]], texts: dict[str, dict[str, str]]) -> Iterator[Row]:
    for number, (name, query, document) in enumerate(relevant, 1):
        missing = next((i for i, t in ((query, "queries"), (document, "corpus")) if i not in texts[t]), None)
        value: dict[str, Any] | Fault
        if missing is not None:
            value = Fault("judgement of a missing text", f"'{missing}'")
        else:
            value = {"query": texts["queries"][query], "positive": texts["corpus"][document]}
        yield Row(number, name, value)
