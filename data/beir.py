"""BEIR folders (arXiv 2104.08663): queries, a corpus, and judgements of which passages are relevant."""

import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from bifocal.data.delimited import read_csv
from bifocal.data.normalize import passage
from bifocal.data.shards import read_on
from bifocal.data.skips import RowError, SkippedRow
from bifocal.data.text_files import Row, file_error, numbered, read_json_lines
from bifocal.errors import DataError

_NUMBER = re.compile(r"-?\d+(\.\d*)?")


class BeirData(NamedTuple):
    """A BEIR folder for the evaluation of retrieval.

    Args:
        queries: text of each judged query by its id.
        corpus: text of each passage by its id.
        relevant: ids of the relevant passages of each query.
        skips: lines that could not be used.
    """

    queries: dict[str, str]
    corpus: dict[str, str]
    relevant: dict[str, list[str]]
    skips: list[SkippedRow]


class _Judgement(NamedTuple):
    """A passage that was judged relevant, with the name of its row."""

    name: str
    query_id: str
    passage_id: str


def is_beir(folder: str) -> bool:
    """Return whether a folder has BEIR's corpus and queries."""
    return all(_json_lines(Path(folder), name) for name in ("corpus", "queries"))


def read_beir(folder: str, start: Any = None, split: str = "train") -> Iterator[Row]:
    """Yield a pair of query and passage for each relevant judgement.

    Only judged passages of the corpus are held in memory. A position is a number of rows.

    Args:
        split: name of the file in `qrels`.
    """
    root = Path(folder)
    judgements = root / "qrels" / f"{split}.tsv"
    if not judgements.exists():
        error = FileNotFoundError(f"no judgements '{judgements}' (existing splits: {_splits(root)})")
        yield Row(None, f"{root.name}/qrels/{split}.tsv", file_error(error))
        return
    relevant, bad_rows = _relevant(judgements)
    queries, bad_queries = _texts(root, "queries", {judgement.query_id for judgement in relevant})
    corpus, bad_passages = _texts(root, "corpus", {judgement.passage_id for judgement in relevant})
    pairs: list[Row] = []
    for judgement in relevant:
        value = _missing(judgement, queries, corpus) or {
            "query": queries[judgement.query_id], "positive": corpus[judgement.passage_id],
        }  # fmt: skip
        pairs.append(Row(None, judgement.name, value))
    yield from numbered([*bad_rows, *bad_queries, *bad_passages, *pairs], start)


def load_beir(folder: str, split: str = "test") -> BeirData:
    """Return the judged queries of a split and the whole corpus.

    Raises:
        DataError: if there are no judgements of this split.
    """
    root = Path(folder)
    judgements = root / "qrels" / f"{split}.tsv"
    if not judgements.exists():
        raise DataError(f"'{folder}' has no judgements of the split '{split}' (there are {_splits(root)}).")
    relevant, bad_rows = _relevant(judgements)
    queries, bad_queries = _texts(root, "queries")
    corpus, bad_passages = _texts(root, "corpus")
    skips = [
        SkippedRow.of(row.name, row.value)
        for row in (*bad_rows, *bad_queries, *bad_passages)
        if isinstance(row.value, RowError)
    ]
    passages: dict[str, list[str]] = {}
    for judgement in relevant:
        missing = _missing(judgement, queries, corpus)
        if missing is None:
            passages.setdefault(judgement.query_id, []).append(judgement.passage_id)
        else:
            skips.append(SkippedRow.of(judgement.name, missing))
    return BeirData({query: queries[query] for query in passages}, corpus, passages, skips)


def _json_lines(root: Path, name: str) -> Path | None:
    return next((path for path in (root / f"{name}.jsonl", root / f"{name}.jsonl.gz") if path.exists()), None)


def _splits(root: Path) -> str:
    return ", ".join(sorted(path.stem for path in (root / "qrels").glob("*.tsv"))) or "none"


def _texts(root: Path, name: str, ids: Collection[str] | None = None) -> tuple[dict[str, str], list[Row]]:
    """Return the texts of a file by their ids, and the lines that cannot be read.

    Args:
        ids: the texts to keep. None keeps all, and a line without an id then is a bad row.
    """
    texts: dict[str, str] = {}
    bad_rows: list[Row] = []
    for row in read_on(read_json_lines, str(_json_lines(root, name))):
        if isinstance(row.value, RowError):
            bad_rows.append(row)
        elif ids is None and "_id" not in row.value:
            bad_rows.append(row._replace(value=RowError("no _id", ", ".join(map(str, row.value)))))
        elif ids is None or str(row.value.get("_id")) in ids:
            texts[str(row.value["_id"])] = passage(row.value)
    return texts, bad_rows


def _relevant(judgements: Path) -> tuple[list[_Judgement], list[Row]]:
    """Return the relevant judgements, and the lines that cannot be read."""
    relevant: list[_Judgement] = []
    bad_rows: list[Row] = []
    for row in read_on(_judgements, str(judgements)):
        if isinstance(row.value, RowError):
            bad_rows.append(row)
        elif row.value["score"] > 0:
            relevant.append(_Judgement(row.name, row.value["query-id"], row.value["corpus-id"]))
    return relevant, bad_rows


def _judgements(path: str, start: Any = None) -> Iterator[Row]:
    """Yield rows with `query-id`, `corpus-id` and `score`, of a file with or without a header."""
    for row in read_csv(path, column_names=("query-id", "corpus-id", "score"), tabs=True):
        if isinstance(row.value, RowError):
            yield row
            continue
        score = row.value["score"].strip()
        if _NUMBER.fullmatch(score):
            yield row._replace(value={**row.value, "score": float(score)})
        elif not row.name.endswith(":1"):
            yield row._replace(value=RowError("broken judgement", f"the score {score[:50]!r} is not a number"))


def _missing(judgement: _Judgement, queries: dict[str, str], corpus: dict[str, str]) -> RowError | None:
    for key, texts in ((judgement.query_id, queries), (judgement.passage_id, corpus)):
        if key not in texts:
            return RowError("judgement of a missing text", f"'{key}'")
    return None
