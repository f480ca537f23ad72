"""The state of an index's table that searches read."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np

from bifocal.embedding.items import KINDS, normalize
from bifocal.hub.search.approximate import ApproximateIndex, open_approximate_index
from bifocal.hub.search.captions import find_captions
from bifocal.hub.search.faiss_indexes import delete_earlier, open_faiss_index, table_state
from bifocal.hub.search.hits import Hit
from bifocal.hub.search.ranking import Calibration, Match, best_things, sample_rows
from bifocal.hub.search.settings import Variant
from bifocal.hub.search.table import Table, have_unit_length, require_unit_length

_CANDIDATES = 4  # per hit, from an index of fewer dimensions or bytes


@dataclass(frozen=True)
class _Rows:
    """Rows of one kind that a search looks at.

    Args:
        kind: "image" or "text".
        bits: one bit for each row of the table.
        count: number of rows.
        groups: the groups that these rows are, see `_group_names`.
    """

    kind: str
    bits: np.ndarray
    count: int
    groups: tuple[str, ...]


class SearchSnapshot:
    """The rows of a table at one moment with their FAISS indexes. It never changes, so that threads share it.

    Args:
        table: to read.
        faiss_folder: folder of the FAISS indexes; if it cannot be written, they are kept in memory only.
        variants: forms of the vectors. The FAISS index of one is opened or built when it is first used.
    """

    def __init__(self, table: Table, faiss_folder: Path, variants: Sequence[Variant]) -> None:
        snapshot = table.open()
        self.stamp = snapshot.stamp
        # Arrow's own table: datasets takes milliseconds for each row, Arrow microseconds.
        self.arrow: Any = snapshot.rows if snapshot.tables else table.schema.empty_table()
        self.parts, self.first_rows = snapshot.parts, np.cumsum([0, *map(len, snapshot.tables)])
        self.keys: list[str] = self.arrow.column("key").to_pylist()
        self.kinds = np.array(self.arrow.column("kind").to_pylist(), dtype=object)
        self.captions = captions = find_captions(self.arrow)
        is_image = self.kinds == "image"
        # An image is found by its captions, too; a caption that is nothing else is no text of its own.
        self.groups = _group_names(is_image, captions.is_caption, captions.is_text)
        self._searched = {
            ("image",): [self._rows("image", is_image), self._rows("text", captions.is_caption)],
            ("text",): [self._rows("text", captions.is_text)],
            KINDS: [self._rows("image", is_image), self._rows("text", ~is_image)],
        }
        masks = {"image": is_image, "text": captions.is_text, "caption": captions.is_caption}
        self.counts = {name: int(mask.sum()) for name, mask in masks.items()}
        # Memory-mapped, as the parts are: each chunk of Arrow's column as one matrix.
        chunks, width = self.arrow.column("embedding").chunks, table.dimensions
        self.chunks = [chunk.flatten().to_numpy(zero_copy_only=False).reshape(len(chunk), width) for chunk in chunks]
        self.first_rows_of_chunks = np.cumsum([0, *map(len, self.chunks)])
        self.width = width
        self.variants = list(variants)
        self._table, self._faiss_folder, self._lock = snapshot, faiss_folder, threading.Lock()
        self._faiss: dict[Variant, Any] = {}
        self.calibration = Calibration({kind: self.vectors(rows) for kind, rows in sample_rows(self.kinds).items()})

    def faiss(self, variant: Variant) -> Any:
        """Return the FAISS index of a variant, or its `ApproximateIndex`."""
        with self._lock:
            if variant not in self._faiss:
                folder, table = self._faiss_folder, self._table
                if variant.approximate:
                    oversampling = self._oversampling(variant)
                    index = open_approximate_index(folder, table, self.groups, self.kinds, variant, oversampling)
                    self._faiss[variant] = index
                else:
                    self._faiss[variant] = open_faiss_index(folder, table, variant)
            return self._faiss[variant]

    def build(self) -> None:
        """Build the FAISS indexes of all variants, so that no search has to, and delete those of earlier states."""
        for variant in self.variants:
            if self.keys:
                self.faiss(variant)
            delete_earlier(self._faiss_folder, variant.file_name, table_state(self._table) if self.keys else None)

    def _oversampling(self, variant: Variant) -> int:
        """Return how many rows to take from a FAISS index for each one that is trusted to be among the nearest.

        Scores by fewer dimensions or bytes than the whole vectors have may put them in another order.
        """
        return 1 if variant.dim == self.width and variant.precision == "float32" else _CANDIDATES

    def _rows(self, kind: str, mask: np.ndarray) -> _Rows:
        groups = tuple(np.unique(self.groups[mask]).tolist())
        return _Rows(kind, np.packbits(mask, bitorder="little"), int(mask.sum()), groups)

    def rank(self, queries: np.ndarray, k: int, kinds: Sequence[str], variant: Variant) -> "Rankings":
        """Return the k things nearest to each query, best first: images with their captions, and texts.

        Args:
            queries: unit vectors (queries, dimensions).
            k: length of a ranking.
            kinds: kinds of things, which share one ranking.
            variant: form of the vectors by which FAISS finds candidates, whose whole vectors are compared then.
        """
        searched = [rows for rows in self._searched[tuple(kind for kind in KINDS if kind in kinds)] if rows.count]
        oversampling = self._oversampling(variant)
        k = min(k, sum(self.counts[kind] for kind in set(kinds)))
        ranked: list[list[Match] | None] = [None if k else [] for _ in queries]
        pending, trusted = list(range(len(queries))) if k else [], k
        while pending:  # several captions of one image may be among the rows: then more rows are needed
            candidates: list[list[tuple[float, float, int]]] = [[] for _ in pending]
            bounds = [float("-inf")] * len(pending)
            for rows in searched:
                nearest = self.nearest_rows(queries[pending], oversampling * trusted, rows, variant)
                for number, (query, of_query) in enumerate(zip(queries[pending], nearest, strict=True)):
                    scores = self.vectors(of_query) @ query
                    by = self._ranking_scores(scores, rows.kind, kinds, query)
                    candidates[number] += zip(by.tolist(), scores.tolist(), of_query.tolist(), strict=True)
                    if oversampling * trusted < rows.count:
                        worst = np.sort(by)[-trusted] if len(by) >= trusted else np.inf
                        bounds[number] = max(bounds[number], float(worst))
            for number, query in enumerate(pending):
                things_of = partial(self._things_of, kinds=kinds, query=queries[query])
                ranked[query] = best_things(candidates[number], things_of, k, bounds[number])
            pending, trusted = [query for query in pending if ranked[query] is None], 2 * trusted
        return Rankings(self, [matches or [] for matches in ranked])

    def _ranking_scores(self, scores: np.ndarray, kind: str, kinds: Sequence[str], query: np.ndarray) -> np.ndarray:
        """Return what rows of a kind are ranked by in a ranking of some kinds."""
        if len(set(kinds)) > 1:
            return self.calibration.ranking_scores(scores, kind, query)
        return self.calibration.image_scores(scores, query) if kind not in kinds else scores

    def _things_of(self, row: int, kinds: Sequence[str], query: np.ndarray) -> Sequence[int]:
        """Return the things that a row stands for; images that share a caption are ordered by their own scores."""
        if self.kinds[row] == "image":
            return (row,)
        images = self.captions.images.get(row, ()) if "image" in kinds else ()
        if len(images) > 1:
            scores = self.vectors(np.array(images)) @ query
            images = tuple(images[number] for number in np.argsort(-scores, kind="stable"))
        return (*images, row) if "text" in kinds and self.captions.is_text[row] else images

    def nearest_rows(self, queries: np.ndarray, k: int, rows: _Rows, variant: Variant) -> list[np.ndarray]:
        """Return, for each query, the rows that are nearest to it by one FAISS index, best first.

        Args:
            queries: unit vectors (queries, dimensions).
            rows: among which to look.
        """
        import faiss

        queries, k = normalize(queries[:, : variant.dim]), min(k, rows.count)
        index = self.faiss(variant)
        if isinstance(index, ApproximateIndex):
            return index.search(queries, k, rows.groups)
        # FAISS scans for each query on its own then, one per core, so that other queries change no result.
        selector: Any = faiss.IDSelectorBitmap  # its types are those of the C++ below
        options = cast(Any, faiss).SearchParameters(sel=selector(rows.bits))
        _, nearest = index.search(queries, k, params=options)
        return [of_query[of_query >= 0] for of_query in nearest]

    def vectors(self, rows: np.ndarray) -> np.ndarray:
        """Return the vectors (rows, dimensions) of some rows.

        Raises:
            SearchError: if one is not of length 1, so that its part is damaged.
        """
        vectors = np.empty((len(rows), self.width), np.float32)
        numbers = np.searchsorted(self.first_rows_of_chunks, rows, "right") - 1
        for position, (number, row) in enumerate(zip(numbers.tolist(), rows.tolist(), strict=True)):
            vectors[position] = self.chunks[number][row - self.first_rows_of_chunks[number]]
        if not have_unit_length(vectors):
            for position, row in enumerate(rows):
                part = self.parts[int(np.searchsorted(self.first_rows, row, "right")) - 1]
                require_unit_length(vectors[position : position + 1], part)
        return vectors

    def hit(self, match: Match) -> Hit:
        row = match.thing
        occurrences = self.arrow.column("occurrences")[row].as_py()
        names = tuple(dict.fromkeys(occurrence["name"] for occurrence in occurrences))
        names = self.captions.text_names.get(row, names)  # without those of captions
        image = self.arrow.column("image")[row].as_py()
        text = self.arrow.column("text")
        return Hit(
            names[0], str(self.kinds[row]), text[row].as_py(), match.score, match.ranking_score,
            thumbnail=None if image is None else image["bytes"],
            names=names,
            caption=None if match.row == row else text[match.row].as_py(),
        )  # fmt: skip


def _group_names(is_image: np.ndarray, is_caption: np.ndarray, is_text: np.ndarray) -> np.ndarray:
    """Return the group of each row: every set of rows that a search looks at consists of whole groups."""
    is_both = is_caption & is_text
    return np.select([is_image, is_both, is_caption], ["image", "caption-text", "caption"], "text")


@dataclass
class Rankings:
    """What several queries found, all in the same snapshot.

    Args:
        snapshot: the rows that were searched.
        matches: what each query found, best first.
    """

    snapshot: SearchSnapshot
    matches: list[list[Match]]

    def hits(self, query: int, text: str = "") -> list[Hit]:
        """Return the hits of a query, with their texts and thumbnails, which are read only now.

        Args:
            query: number of the query.
            text: text of the query, which was ranked by its vector only.
        """
        return [self.snapshot.hit(match) for match in self.matches[query]]
