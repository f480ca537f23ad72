"""A search index: the table of a model's vectors, FAISS indexes of them, and the model that they came from."""

import os
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np

from bifocal.embedding.items import KINDS, Item, normalize
from bifocal.hub.search.approximate import ApproximateIndex
from bifocal.hub.search.atomic import temporary_files
from bifocal.hub.search.captions import captions_to_remove
from bifocal.hub.search.hits import Hit, SearchError, check_kinds, require_finite
from bifocal.hub.search.ingestion import Embed, Ingestion
from bifocal.hub.search.lock import LOCK, index_lock, is_locked
from bifocal.hub.search.settings import FORMAT, SETTINGS, IndexSettings, Variant, read_settings, write_settings
from bifocal.hub.search.snapshot import Rankings, SearchSnapshot
from bifocal.hub.search.sync import NO_SOURCE, AddResult, ItemSource, SourceScan
from bifocal.hub.search.table import Occurrence, Table, TableSnapshot, all_occurrences


class SearchIndex(IndexSettings):
    """A folder of `index.json`, `table/` and `faiss/`.

    FAISS indexes are built from the table: one for each `Variant`, a number of dimensions with a precision, searched
    exhaustively or approximately. All dimensions in float32, searched exhaustively, give exact results; other variants
    give candidates, which are scored with their whole vectors.
    Searching needs no permission to write.

    Args:
        folder: folder of the index.
        faiss_folder: folder of the FAISS indexes; within the index's own folder if None.

    Raises:
        SearchError: if there is no index, or one that is damaged or of another version.
    """

    def __init__(self, folder: str | Path, faiss_folder: str | Path | None = None) -> None:
        super().__init__(Path(folder))
        self.faiss_folder = self.folder / "faiss" if faiss_folder is None else Path(faiss_folder)
        self.table = Table(self.folder / "table", self.dimensions)
        self._snapshot: SearchSnapshot | None = None

    @classmethod
    def create(
        cls, folder: str | Path, model: str, weights: str, dimensions: int, dims: Sequence[int] = (),
        precisions: Sequence[str] = (), prompts: dict[str, str] | None = None, dtype: str = "model",
        fast_decoding: bool | None = None, approximate: bool = False,
    ) -> "SearchIndex":  # fmt: skip
        """Return a new, empty index; or the existing one if it is of the same model and dtype, or empty.

        Args:
            folder: folder of the index.
            model: folder, recorded by its absolute path, or Hub id from which the model is loaded.
            weights: hash of the model's weights, see `weights_hash`.
            dimensions: length of the model's vectors.
            dims: numbers of leading dimensions to search by; all dimensions if empty.
            precisions: "float32" and "int8"; the former if empty.
            prompts: texts that go before queries ("query") and indexed texts ("document"); an existing index keeps its
                own, with which its texts were embedded.
            dtype: dtype that vectors are computed in, see `EmbeddingModel`.
            fast_decoding: whether large JPEGs are decoded at reduced scale; as before in an existing index if None, and
                not in a new one.
            approximate: whether the index is searched approximately in these variants. An existing index keeps its
                other variants, and gets no new one if none is asked for.

        Raises:
            SearchError: if the folder holds something else or an index of another model, dtype or decoding, or an
                option is wrong.
        """
        folder = Path(folder)
        cls.check_dims(dims, dimensions)
        cls.check(folder, precisions)
        variants = [
            Variant(dim, precision, approximate)
            for dim in (dims or [dimensions])
            for precision in (precisions or ["float32"])
        ]
        is_default = not (dims or precisions or approximate)
        if os.path.isdir(os.path.expanduser(model)):
            model = os.path.abspath(os.path.expanduser(model))
        settings = dict(
            format=FORMAT, model=model, weights=weights, dimensions=dimensions, prompts=prompts or {}, dtype=dtype,
            sources=[], parts=0, fast_decoding=bool(fast_decoding), variants=[one.to_json() for one in variants],
        )  # fmt: skip
        if (folder / SETTINGS).exists():
            index = cls(folder)
            if index.has_rows():  # refuse at once, without waiting for another command
                index.require_same_weights(weights, model)
                index.require_same_dtype(dtype)
                index.require_decoding(fast_decoding)
            with index_lock(folder):
                if (folder / SETTINGS).exists():  # otherwise another command found nothing to index, and deleted it
                    index = cls(folder)
                    if (index.weights == weights and index.dtype == dtype) or index.has_rows():
                        index.require_same_weights(weights, model)
                        index.require_same_dtype(dtype)
                        if index.has_rows():
                            index.require_decoding(fast_decoding)
                        elif fast_decoding is not None:
                            index.fast_decoding = fast_decoding
                        index.model = model
                        index.variants += [one for one in variants if not is_default and one not in index.variants]
                        index._save()
                        return index
                    for part in index.table.parts:  # without any row: an empty index may change its model
                        part.unlink()
                write_settings(folder, settings)
            return cls(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SearchError(f"'{folder}' cannot be created ({error.strerror}). Choose another folder.") from error
        write_settings(folder, settings)
        return cls(folder)

    def discard_if_empty(self) -> None:
        """Delete the files of an index without rows, so that its folder belongs to no model."""
        with index_lock(self.folder):
            if self.has_rows():
                return
            for part in self.table.parts:
                part.unlink()
            (self.folder / SETTINGS).unlink(missing_ok=True)
            self._snapshot = None
            # While it is held: a command that waits for it sees that it is gone, and makes its own.
            (self.folder / LOCK).unlink(missing_ok=True)
            for folder in (self.table.folder, self.folder / "faiss", self.folder):
                if folder.is_dir() and not any(folder.iterdir()):
                    folder.rmdir()

    def has_rows(self) -> bool:
        """Return whether the index holds anything; a missing part counts, since its items can be embedded again."""
        return bool(self.table.missing(self.parts)) or any(map(len, self.table.open().tables))

    def __len__(self) -> int:
        return len(self._open().keys)

    def snapshot(self) -> TableSnapshot:
        """Return the rows as they are now.

        Raises:
            SearchError: if a part is damaged or missing.
        """
        self._require_parts()
        return self.table.open()

    def counts(self) -> dict[str, int]:
        """Return the number of images ("image"), of their captions ("caption") and of other texts ("text")."""
        return dict(self._open().counts)

    def add(
        self, items: Iterable[Item], embed: Embed, progress: Callable[[int], None] = lambda count: None,
        source: ItemSource | None = None, prune: bool = False,
    ) -> AddResult:  # fmt: skip
        """Embed and write items that are not in the index, part by part, then update names and captions of the others.

        After a kill, the next run resumes: it embeds only what was not written.

        Args:
            embed: embeds items of different content, see `embed_items`.
            progress: called with the number of items read.
            source: source of the items; without one, nothing counts as missing.
            prune: delete what the index has of this source and the source no longer has.
        """
        with index_lock(self.folder):
            self._claim()
            self._delete_temporary_files()
            missing = self.table.missing(self.parts)
            for name in missing:
                self.table.fill(name)
            known_keys = {key for key, _ in all_occurrences(self.table.open())}
            scan = SourceScan(self._source_number(source))
            ingestion = Ingestion(self.table, known_keys, scan, embed, self._record_parts)
            result = ingestion.run(items, progress)
            result.restored = len(missing)
            self._update_occurrences(ingestion, source, prune)
            self._snapshot = None
            self._open().build()
        return result

    def describe(self, variant: Variant | None = None) -> str:
        """Return what those who search an approximate variant should know; empty for others, and without any rows.

        Args:
            variant: a variant of the index; the one that is searched by default if None.
        """
        variant = variant or self.choose_variant()
        snapshot = self._open(variant)
        found = snapshot.faiss(variant) if variant.approximate and snapshot.keys else None
        return found.in_words() if isinstance(found, ApproximateIndex) else ""

    def _claim(self) -> None:
        """Write the settings again if another command deleted the empty index. The caller holds the lock.

        Raises:
            SearchError: if the index belongs to another model or dtype now.
        """
        if not (self.folder / SETTINGS).exists():
            if not self.table.parts:
                self.sources, self.parts = [], 0
            self._write_settings()
            return
        owner = SearchIndex(self.folder)
        owner.require_same_weights(self.weights, self.model)
        owner.require_same_dtype(self.dtype)
        owner.require_decoding(self.fast_decoding)

    def _record_parts(self, parts: int) -> None:
        self.parts = max(self.parts, parts)
        self._save()

    def _source_number(self, source: ItemSource | None) -> int:
        """Return the number of a source in the settings, where its options are recorded."""
        if source is None:
            return NO_SOURCE
        self.sources = read_settings(self.folder)["sources"]
        number = next((n for n, known in enumerate(self.sources) if known["identity"] == source.identity), None)
        record = {"identity": source.identity, "options": source.options}
        if number is None:
            self.sources.append(record)
            self._save()
            return len(self.sources) - 1
        if self.sources[number] != record:
            sources = [*self.sources[:number], record, *self.sources[number + 1 :]]
            write_settings(self.folder, {**read_settings(self.folder), "sources": sources})
            self.sources = sources
        return number

    def _update_occurrences(self, ingestion: Ingestion, source: ItemSource | None, prune: bool) -> None:
        """Update names and captions, and delete what is replaced and, on request, what is missing."""
        scan, result = ingestion.scan, ingestion.result
        if not scan.names:  # probably a disk that is not mounted, not a source that lost everything
            return
        complete = source is not None and source.complete
        unread = ingestion.unread | (source.unread if source is not None else set())
        self.table.rewrite(lambda key, kind, before: scan.update(key, kind, before, complete, unread, prune, result))

    def remove(self, names: Sequence[str] = (), source: str | None = None) -> int:
        """Delete rows, also from the files, and return how many. The captions of an image are deleted with it.

        Content that has other names stays under those.

        Args:
            names: names, patterns of names (`photos/*`) or keys.
            source: local path or Hub id that was indexed; everything that came from it is deleted.

        Raises:
            SearchError: if a name matches no row, or the source was not indexed; then nothing is deleted.
        """
        with index_lock(self.folder):
            self._delete_temporary_files()
            sources = read_settings(self.folder)["sources"]
            paths = {source, os.path.abspath(os.path.expanduser(source))} if source is not None else set()
            numbers = {n for n, record in enumerate(sources) if paths & set(record["identity"].get("paths", ()))}
            if source is not None and not numbers:
                all_paths = {str(path) for record in sources for path in record["identity"].get("paths", ())}
                known = ", ".join(sorted(all_paths))
                raise SearchError(f"'{source}' is not a source of '{self.folder}'. It has {known or 'none by name'}.")
            snapshot = self.snapshot()
            rows = [(key, item.name) for key, occurrences in all_occurrences(snapshot) for item in occurrences]
            for name in names:
                if not any(_matches(name, *row) for row in rows):
                    raise SearchError(f"Nothing in '{self.folder}' is called '{name}'. Use the names that hits show.")

            def is_removed(key: str, item: Occurrence) -> bool:
                return item.source in numbers or any(_matches(name, key, item.name) for name in names)

            captions = captions_to_remove(snapshot.rows, is_removed) if snapshot.tables else set()

            def kept(key: str, kind: str, occurrences: list[Occurrence]) -> list[Occurrence]:
                return [
                    item
                    for item in occurrences
                    if not is_removed(key, item) and (key, item.source, item.name) not in captions
                ]

            count = self.table.rewrite(kept)
            self._snapshot = None
            self._open().build()
        return count

    def search(
        self, vector: np.ndarray, k: int = 10, kinds: Sequence[str] = KINDS, variant: Sequence[Any] | None = None
    ) -> list[Hit]:
        """Return the k items nearest to a query. Several kinds share one ranking, see `Calibration`.

        An image and its captions are one item, an image, whose best match counts.

        Args:
            vector: (dimensions,) of the query.
            kinds: kinds to search for; captions are no texts of their own.
            variant: a `Variant` of the index; the most exact one if None, see `choose_variant`.

        Raises:
            SearchError: if an option is wrong, the vector is not finite, or the index is empty.
        """
        vector = np.asarray(vector, np.float32)
        if vector.shape != (self.dimensions,):
            raise SearchError(f"The query has {vector.shape} numbers, but the index has {self.dimensions} dimensions.")
        ranking = self.rank(vector[None], k, kinds, variant)
        return ranking.hits(0)

    def rank(
        self, vectors: np.ndarray, k: int = 10, kinds: Sequence[str] = KINDS, variant: Sequence[Any] | None = None
    ) -> Rankings:
        """Search for several queries (queries, dimensions) at once; see `search`."""
        kinds = check_kinds(kinds)
        if k < 1:
            raise SearchError(f"The number of hits must be at least 1, not {k}.")
        queries = np.asarray(vectors, np.float32)
        require_finite(queries)
        chosen = self.choose_variant() if variant is None else self.require_variant(*variant)
        snapshot = self._open(chosen)
        if not len(snapshot.keys):
            raise SearchError(f"The index '{self.folder}' is empty. Add something with bifocal index.")
        return snapshot.rank(normalize(queries), k, kinds, chosen)

    def _open(self, variant: Variant | None = None) -> SearchSnapshot:
        """Return the present state; for an approximate variant, the one before as long as a command is changing it.

        That command builds the approximate index of the state that it leaves, which takes long.
        """
        stamp, snapshot = self.table.stamp(), self._snapshot  # other threads may replace it
        if snapshot is None or snapshot.stamp != stamp:
            is_approximate = variant is not None and variant.approximate
            if is_approximate and snapshot is not None and snapshot.keys and is_locked(self.folder):
                return snapshot
            self._require_parts()
            snapshot = self._snapshot = SearchSnapshot(self.table, self.faiss_folder, self.variants)
        return snapshot

    def _delete_temporary_files(self) -> None:
        """Delete the unfinished files of killed runs. The caller holds the lock."""
        self.table.delete_temporary_files()
        unfinished = [path for pattern in ("*.faiss", "*.json") for path in temporary_files(self.faiss_folder, pattern)]
        for path in unfinished + temporary_files(self.folder, SETTINGS):
            path.unlink(missing_ok=True)

    def _require_parts(self) -> None:
        """Check that all parts of the table exist.

        Raises:
            SearchError: if parts of the table are missing.
        """
        missing = self.table.missing(self.parts)
        if missing:
            verb = "is" if len(missing) == 1 else f"and {len(missing) - 1} more are"
            raise SearchError(
                f"'{self.table.folder / missing[0]}' {verb} missing. Put it back, or run bifocal index again with the "
                "index's sources to embed its items again."
            )


def _matches(pattern: str, key: str, name: str) -> bool:
    return pattern in (key, name) or (any(sign in pattern for sign in "*?[") and fnmatchcase(name, pattern))
