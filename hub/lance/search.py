"""Searches a table in LanceDB by vectors, or by vectors and words."""

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bifocal.embedding.items import KINDS, normalize
from bifocal.errors import first_line
from bifocal.hub.lance.database import (
    CALIBRATION,
    ITEMS,
    connect,
    errors_as_search_errors,
    quoted,
    read_settings,
    table_names,
)
from bifocal.hub.lance.indexes import DISTANCE, WORDS, calibration_of, sample, vectors_of
from bifocal.hub.search.hits import Hit, SearchError, check_kinds, require_finite
from bifocal.hub.search.ranking import Calibration, Match, best_things
from bifocal.hub.search.settings import Variant

_REFINE_FACTOR = 10  # candidates per hit that an approximate search scores again with their whole vectors
_REFRESH = 5.0  # seconds until a search looks for what others have written
_MAX_ROWS_PER_HIT = 256  # where one image has many captions that match; there may be fewer hits then
_FUSED = 50  # rows, at least, of each of the two rankings that a hybrid search fuses
_MAX_WORDS_LENGTH = 1_000  # characters of a text whose words are searched for
_COLUMNS = ("key", "kind", "name", "names", "text", "image_names", "is_text", "vector")
# Of a ranking of some kinds: the kind of vectors and the condition of each group of rows. An image is found by its
# captions, too; a caption that is nothing else is no text of its own.
_GROUPS = {
    ("image",): (("image", "kind = 'image'"), ("text", "is_caption")),
    ("text",): (("text", "is_text"),),
    KINDS: (("image", "kind = 'image'"), ("text", "kind = 'text'")),
}


@dataclass(frozen=True)
class _State:
    """A table as it was at one moment, which searches of several threads share.

    Args:
        table: opened at one version; others may write further ones.
        calibration: makes scores of images and texts comparable.
        sampled: version of the sample that it comes from; before there is one, minus the rows it was drawn from.
        seen: when it was known to be the latest, in seconds of the monotonic clock.
    """

    table: Any
    calibration: Calibration
    sampled: int
    seen: float


class LanceIndex:
    """A LanceDB database that `bifocal embed` or `bifocal export-lancedb` wrote, as `Searcher` searches it.

    Each search sees one version of the table, at most a few seconds old while others write.

    Args:
        uri: a folder, or an address that LanceDB knows.
        where: condition of SQL that hits must fulfil, over the columns of the table.
        hybrid: rank by the words of a query, too: by LanceDB's reciprocal rank fusion.

    Raises:
        SearchError: if there is no such table, it was written by another program, or the condition is wrong.
    """

    def __init__(self, uri: str, where: str | None = None, hybrid: bool = False) -> None:
        self.uri, self.where, self.hybrid = uri, where, hybrid
        self._lock = threading.Lock()
        with errors_as_search_errors(uri):
            if ITEMS not in table_names(connect(uri, quick=True)):
                raise SearchError(
                    f"There is no table '{ITEMS}' at '{uri}'. Write one with bifocal embed --database or "
                    "bifocal export-lancedb."
                )
            self._database = connect(uri)
            settings = read_settings(self._database.open_table(ITEMS), uri)
            self._state = self._opened()
            if where is not None:
                self._require_condition(where)
            if hybrid:
                self._require_words()
        self.model: str = settings["model"]
        self.weights: str = settings["weights"]
        self.dimensions: int = settings["dimensions"]
        self.dtype: str = settings["dtype"]
        self.fast_decoding: bool = settings["fast_decoding"]
        self.prompts = {"query": settings["query_prompt"]}
        self.variants = [Variant(self.dimensions, settings["precision"])]

    def _opened(self, before: _State | None = None) -> _State:
        """Return the latest state, with what the one before has read if nothing was written since."""
        table, seen = self._database.open_table(ITEMS), time.monotonic()
        if before is not None and before.table.version == table.version:
            table = before.table
        if CALIBRATION in table_names(self._database):
            samples = self._database.open_table(CALIBRATION)
            if before is not None and before.sampled == samples.version:
                return _State(table, before.calibration, before.sampled, seen)
            return _State(table, calibration_of(samples.to_arrow()), samples.version, seen)
        rows = table.count_rows()  # embedding is not finished
        if before is not None and rows < -2 * before.sampled:
            return _State(table, before.calibration, before.sampled, seen)
        return _State(table, calibration_of(sample(table)), -rows, seen)

    def _latest(self) -> _State:
        if time.monotonic() - self._state.seen > _REFRESH and self._lock.acquire(blocking=False):
            try:
                self._state = self._opened(self._state)
            finally:
                self._lock.release()
        return self._state

    def _require_condition(self, where: str) -> None:
        """Check a condition of SQL.

        Raises:
            SearchError: if LanceDB does not understand it.
        """
        table = self._state.table
        try:
            table.search().where(where).select(["key"]).limit(1).to_arrow()
        except Exception as error:  # LanceDB raises many kinds
            reason = first_line(error).removeprefix("Invalid input, ").split(" Valid ")[0]
            columns = ", ".join(name for name in table.schema.names if name not in ("image", "vector"))
            raise SearchError(
                f"The filter '{where}' cannot be used ({reason[:200]}). Write a condition of SQL over {columns}."
            ) from error

    def _require_words(self) -> None:
        """Check that words can be searched for.

        Raises:
            SearchError: if the full-text indexes are not built yet.
        """
        indexed = {column for index in self._state.table.list_indices() for column in index.columns}
        if not indexed.issuperset(WORDS):
            raise SearchError(
                f"The database at '{self.uri}' has no full-text indexes yet. They are built when bifocal embed ends; "
                "omit --hybrid until then."
            )

    def require_same_weights(self, weights: str, model: str) -> None:
        """Check that the table was made with these weights.

        Raises:
            SearchError: if it was made with other weights.
        """
        if weights != self.weights:
            raise SearchError(
                f"The database at '{self.uri}' was made with '{self.model}' ({self.weights}), but '{model}' has other "
                f"weights ({weights}), whose vectors cannot be compared. Pass --model with the right one."
            )

    def choose_variant(
        self, dim: int | None = None, precision: str | None = None, approximate: bool = False
    ) -> Variant:
        """Return the form of the vectors to search by: there is one."""
        only = self.variants[0]
        return self.require_variant(dim or only.dim, precision or only.precision, approximate)

    def require_variant(self, dim: int, precision: str, approximate: bool = False) -> Variant:
        """Return a form of the vectors.

        Raises:
            SearchError: if the database lacks it.
        """
        if (variant := Variant(dim, precision, approximate)) not in self.variants:
            raise SearchError(f"'{self.uri}' can only be searched by {self.variants[0]}, not by {variant}.")
        return variant

    def describe(self, variant: Variant | None = None) -> str:
        """Return what those who search should know: which rows are searched and how; empty for all rows by vectors."""
        how = ["by vectors and words"] if self.hybrid else []
        how += [f"only where {self.where}"] if self.where is not None else []
        return f"Searching {self.uri} {', '.join(how)}." if how else ""

    def counts(self) -> dict[str, int]:
        """Return the number of images and texts that fulfil the condition, and of captions of images."""
        conditions = {"image": "kind = 'image'", "text": "is_text", "caption": "is_caption"}
        with errors_as_search_errors(self.uri):
            table = self._latest().table
            return {kind: table.count_rows(self.condition(of_kind)) for kind, of_kind in conditions.items()}

    def condition(self, condition: str) -> str:
        """Return a condition of SQL together with that of the index."""
        return condition if self.where is None else f"({self.where}) AND ({condition})"

    def rank(
        self, vectors: np.ndarray, k: int = 10, kinds: Sequence[str] = KINDS, variant: Variant | None = None
    ) -> "LanceRankings":
        """Return the rankings of several queries. Several kinds share one ranking, see `Calibration`.

        With an index of the vectors the search is approximate: it may miss an item, but scores stay exact. A query is
        searched for when its hits are asked for, by the thread that asks: LanceDB waits for the store, not for a core.

        Args:
            vectors: (queries, dimensions), or more dimensions of which the leading ones are used.
            k: length of a ranking.
            kinds: kinds to search for.
            variant: the only form of the vectors.

        Raises:
            SearchError: if an option is wrong, a vector is not finite, or the database cannot be read.
        """
        kinds = check_kinds(kinds)
        if k < 1:
            raise SearchError(f"The number of hits must be at least 1, not {k}.")
        if variant is not None:
            self.require_variant(*variant)
        queries = np.asarray(vectors, np.float32)[:, : self.dimensions]
        if queries.shape[1] != self.dimensions:
            raise SearchError(f"The query has {queries.shape[1]} numbers, but '{self.uri}' has {self.dimensions}.")
        require_finite(queries)
        with errors_as_search_errors(self.uri):
            return LanceRankings(
                self, self._latest(), normalize(queries), k, tuple(kind for kind in KINDS if kind in kinds)
            )


@dataclass
class LanceRankings:
    """What several queries ask for, all of the same version of a table.

    Args:
        index: the database.
        state: version that is searched.
        queries: unit vectors (queries, dimensions).
        k: number of hits.
        kinds: kinds to search for, in the order of `KINDS`.
    """

    index: LanceIndex
    state: _State
    queries: np.ndarray
    k: int
    kinds: tuple[str, ...]

    def hits(self, query: int, text: str = "") -> list[Hit]:
        """Return the hits of a query, which is searched for now.

        Args:
            query: number of the query.
            text: text of the query, whose words count in a hybrid search.
        """
        words = text.strip()[:_MAX_WORDS_LENGTH] if self.index.hybrid else ""
        with errors_as_search_errors(self.index.uri):
            return _Query(self, self.queries[query], words).hits()


class _Query:
    """A search for one query. Rows are those of the table, things are rows of equal content with their captions."""

    def __init__(self, rankings: LanceRankings, vector: np.ndarray, words: str) -> None:
        self.index, self.table = rankings.index, rankings.state.table
        self.calibration = rankings.state.calibration
        self.k, self.kinds = rankings.k, rankings.kinds
        self.vector, self.words = vector, words
        self.rows: dict[int, dict[str, Any]] = {}  # that were found, by row id
        self.images: dict[str, dict[str, dict[str, Any]]] = {}  # by name, the images of captions by their keys
        self.things: dict[str, dict[str, Any]] = {}  # row of each image or text, by key

    def hits(self) -> list[Hit]:
        limit = self.k
        while True:  # several captions of one image may be among the rows: then more rows are needed
            ranked, bound = self._by_words(limit) if self.words else self._by_vector(limit)
            self._find_images()
            if limit > _MAX_ROWS_PER_HIT * self.k:
                bound = float("-inf")
            matches = best_things(ranked, self._things_of, self.k, bound)
            if matches is not None:
                return self._loaded(matches)
            limit *= 2

    def _by_vector(self, limit: int) -> tuple[list[tuple[float, float, int]], float]:
        """Return ranking score, score and id of the nearest rows of each group, and what no other row exceeds."""
        ranked: list[tuple[float, float, int]] = []
        bound = float("-inf")
        for kind, condition in _GROUPS[self.kinds]:
            query = self.table.search(self.vector, vector_column_name="vector").distance_type(DISTANCE)
            query = query.where(self.index.condition(condition), prefilter=True).refine_factor(_REFINE_FACTOR)
            rows = query.select([*_COLUMNS, "_distance"]).with_row_id(True).limit(limit).to_arrow()
            scores = self._keep(rows)
            by = self._ranking_scores(scores, kind)
            ranked += zip(by.tolist(), scores.tolist(), rows["_rowid"].to_pylist(), strict=True)
            if len(rows) == limit:
                bound = max(bound, float(by.min()))
        return sorted(ranked, key=lambda row: (-row[0], -row[1], row[2])), bound

    def _by_words(self, limit: int) -> tuple[list[tuple[float, float, int]], float]:
        """Return what `_by_vector` returns, with a ranking by words fused into it."""
        import pyarrow as pa
        from lancedb.query import MultiMatchQuery
        from lancedb.rerankers import RRFReranker

        limit = max(limit, _FUSED)
        nearest, bound = self._by_vector(limit)
        condition = self.index.condition(" OR ".join(condition for _, condition in _GROUPS[self.kinds]))
        query = self.table.search(MultiMatchQuery(self.words, list(WORDS)), query_type="fts")
        query = query.where(condition, prefilter=True).select([*_COLUMNS, "_score"]).with_row_id(True)
        rows = query.limit(limit).to_arrow()
        scores = dict(zip(rows["_rowid"].to_pylist(), self._keep(rows).tolist(), strict=True))
        rankings = [[row for _, _, row in nearest], list(scores)]
        tables = [pa.table({"_rowid": pa.array(ranking, pa.uint64())}) for ranking in rankings]
        fused = RRFReranker().rerank_hybrid(self.words, *tables).to_pylist()
        scores |= {row: score for _, score, row in nearest}
        ranked = [(one["_relevance_score"], scores[one["_rowid"]], one["_rowid"]) for one in fused]
        # What is not among so many of both rankings has no place in the fused one, unless there are too few things.
        is_all = bound == float("-inf") and len(rows) < limit
        return ranked, float("-inf") if is_all else 0.0

    def _keep(self, rows: Any) -> np.ndarray:
        """Keep rows that were found, and return their cosine similarities to the query."""
        for row in rows.drop_columns(["vector"]).to_pylist():
            self.rows.setdefault(row["_rowid"], row)
        # From the vectors themselves: the distance is 1 - cosine, rounded when it was nearly 1.
        return normalize(vectors_of(rows)) @ self.vector

    def _ranking_scores(self, scores: np.ndarray, kind: str) -> np.ndarray:
        """Return what rows of a kind are ranked by in a ranking of the kinds that are searched for."""
        if len(self.kinds) > 1:
            return self.calibration.ranking_scores(scores, kind, self.vector)
        return self.calibration.image_scores(scores, self.vector) if kind not in self.kinds else scores

    def _find_images(self) -> None:
        """Look up the images of the captions that were found."""
        if "image" not in self.kinds:
            return
        names = {name for row in self.rows.values() for name in row["image_names"] or ()} - set(self.images)
        if not names:
            return
        self.images |= {name: {} for name in names}
        listed = ", ".join(map(quoted, sorted(names)))
        condition = self.index.condition(f"kind = 'image' AND name IN ({listed})")
        query = self.table.search().where(condition).select([name for name in _COLUMNS if name != "is_text"])
        found = query.with_row_id(True).to_arrow()
        scores = normalize(vectors_of(found)) @ self.vector
        for row, score in zip(found.drop_columns(["vector"]).to_pylist(), scores.tolist(), strict=True):
            self.images[row["name"]][row["key"]] = row | {"score": score}

    def _things_of(self, row_id: int) -> list[str]:
        """Return the keys of the things that a row stands for; images of one caption are ordered by their scores."""
        row = self.rows[row_id]
        named = [image for name in row["image_names"] or () for image in self.images.get(name, {}).items()]
        images = {key: image for key, image in named if row["text"] in (image["text"] or "")}
        keys = sorted(images, key=lambda key: -images[key]["score"])
        is_text = row["is_text"] or ("image" in self.kinds and not keys)  # a caption whose image is not there
        own = [row["key"]] if row["kind"] == "image" or (is_text and "text" in self.kinds) else []
        for key in keys:
            self.things.setdefault(key, images[key])
        for key in own:
            self.things.setdefault(key, row)
        return [*keys, *own]

    def _loaded(self, matches: Sequence[Match]) -> list[Hit]:
        """Return hits with their thumbnails, which are read only now, and the names of rows of equal content."""
        things = [self.things[match.thing] for match in matches]
        ids = sorted({thing["_rowid"] for thing in things if thing["kind"] == "image"})
        images: dict[int, bytes | None] = {}
        if ids:
            loaded = self.table.take_row_ids(ids).select(["image"]).with_row_id().to_arrow().to_pylist()
            images = {row["_rowid"]: row["image"] for row in loaded}
        same: dict[str, dict[str, None]] = {}
        for row in sorted(self.rows.values(), key=lambda row: row["_rowid"]):
            same.setdefault(row["key"], {}).update(dict.fromkeys(row["names"]))
        return [
            Hit(
                thing["name"], thing["kind"], thing["text"], match.score, match.ranking_score,
                thumbnail=images.get(thing["_rowid"]),
                names=tuple(dict.fromkeys([*thing["names"], *same.get(match.thing, ())])),
                caption=None if self.rows[match.row]["key"] == match.thing else self.rows[match.row]["text"],
            )
            for thing, match in zip(things, matches, strict=True)
        ]  # fmt: skip
