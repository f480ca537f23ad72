"""Compare two sources, and report which rows of the first are in the second."""

import json
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path

from bifocal.data.leakage import Leak, decided_by, find_leaks, read_content
from bifocal.data.loading import compared_kind, iter_rows
from bifocal.data.near_duplicates import IMAGE_DISTANCE, TEXT_SIMILARITY
from bifocal.data.source import Source
from bifocal.errors import DataError
from bifocal.files import overwrite

LEAKS = "list of leaks"  # kind of the file


@dataclass
class Leakage:
    """The leaks between two sources.

    Args:
        train, evaluation: titles of the sources.
        train_rows, evaluation_rows: numbers of rows compared.
        train_skipped, evaluation_skipped: numbers of rows that could not be read.
        decided_by: "image" or "text": what makes a row a leaked one.
        leaks: every leak.
    """

    train: str
    evaluation: str
    train_rows: int
    evaluation_rows: int
    train_skipped: int
    evaluation_skipped: int
    decided_by: str
    leaks: list[Leak]

    def leaked_rows(self) -> list[str]:
        """Return the names of the training rows that are in the evaluation set."""
        return list(dict.fromkeys(leak.train for leak in self.leaks if leak.match == self.decided_by))

    def summary(self) -> str:
        """Return the counts as lines of text."""
        counts: Counter[tuple[str, bool]] = Counter()
        rows: defaultdict[str, set[str]] = defaultdict(set)
        for leak in self.leaks:
            counts[leak.match, leak.exact] += 1
            rows[leak.match].add(leak.train)
        leaked = len(self.leaked_rows())
        lines = [f"{leaked:,} of {self.train_rows:,} rows ({leaked / self.train_rows:.2%}) are in {self.evaluation}, "
                 f"by their {self.decided_by}."]  # fmt: skip
        for match in ("image", "text"):
            if rows[match]:
                note = "" if match == self.decided_by else "; short captions match by chance, so the image decides"
                lines.append(f"{match}s: {counts[match, True]:,} equal, {counts[match, False]:,} near-duplicates, in "
                             f"{len(rows[match]):,} rows{note}")  # fmt: skip
        if self.train_skipped or self.evaluation_skipped:
            lines.append(f"not compared, since they cannot be read: {self.train_skipped:,} rows of {self.train}, "
                         f"{self.evaluation_skipped:,} of {self.evaluation}")  # fmt: skip
        return "\n".join(lines)


def write_leaks(leakage: Leakage, path: Path) -> None:
    """Write every leak as a line of JSON.

    Raises:
        NotOursError: if the path has another file.
        OSError: if it cannot be written.
    """
    with overwrite(path, LEAKS) as scratch, scratch.open("w", encoding="utf-8", errors="backslashreplace") as file:
        file.writelines(json.dumps(asdict(leak), ensure_ascii=False) + "\n" for leak in leakage.leaks)


def compare_sources(
    train: Source,
    evaluation: Source,
    kinds: tuple[str | None, str | None] = (None, None),
    max_distance: int = IMAGE_DISTANCE,
    min_similarity: float = TEXT_SIMILARITY,
) -> Leakage:
    """Return which rows of a training source are in an evaluation source.

    Args:
        kinds: kinds of the rows of both; None infers them.
        max_distance, min_similarity: as for `find_leaks`.

    Raises:
        DataError: if a source cannot be read, or nothing of the two can be compared.
    """
    contents = []
    for source, kind in zip((train, evaluation), kinds):
        try:
            contents.append(read_content(iter_rows(source, kind or compared_kind(source))))
        except DataError as error:
            raise DataError(f"'{source.title}': {error}") from error
    ours, theirs = contents
    if not (ours.digests and theirs.digests) and not (ours.written and theirs.written):
        raise DataError("One source has only images, the other only texts. Nothing of them can be compared.")
    leaks = find_leaks(ours, theirs, max_distance, min_similarity)
    return Leakage(train.title, evaluation.title, ours.rows, theirs.rows, ours.skipped, theirs.skipped,
                   decided_by(ours, theirs), leaks)  # fmt: skip
