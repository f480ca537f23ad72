"""An index: the table of a model's vectors, FAISS indexes of them, and the model they came from."""

import hashlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, cast

import numpy as np

from bifocal.hub.search.adding import Adding
from bifocal.hub.search.items import KINDS, Hit, Item, SearchError, known_kinds, unit
from bifocal.hub.search.mirror import NO_SOURCE, Added, Origin, Scan
from bifocal.hub.search.opened import Opened
from bifocal.hub.search.settings import FORMAT, PRECISIONS, SETTINGS, read_settings, write_settings
from bifocal.hub.search.table import Place, Snapshot, Table, all_places

_CANDIDATES = 4  # times the hits wanted are taken from a shortened or rounded index, then scored with whole vectors
_PATIENCE = 3.0  # seconds after which a command says that it waits for another one

logger = logging.getLogger(__name__)


class SearchIndex:
    """A folder of `index.json`, `table/` and `faiss/`.

    Each FAISS index (a number of dimensions and a precision) is derived from the table and rebuilt where it does not
    fit. Those of all dimensions in float32 are exact; from others four times the hits wanted are taken and scored with
    the whole vectors. Searching needs no right to write.

    Args:
        folder: of an index.
        faiss_folder: where FAISS indexes are kept; in the index's own folder when None.

    Raises:
        SearchError: there is none, or one that is damaged or of another version.
    """

    def __init__(self, folder: str | Path, faiss_folder: str | Path | None = None) -> None:
        self.folder = Path(folder)
        self.faiss_folder = self.folder / "faiss" if faiss_folder is None else Path(faiss_folder)
        settings = read_settings(self.folder)
        self.model: str = settings["model"]
        self.weights: str = settings["weights"]
        self.dimensions: int = settings["dimensions"]
        self.forms: list[tuple[int, str]] = [(dim, precision) for dim, precision in settings["forms"]]
        self.sources: list[dict[str, Any]] = settings["sources"]
        self.parts: int = settings["parts"]
        self.table = Table(self.folder / "table", self.dimensions)
        self._opened: Opened | None = None

    @classmethod
    def create(
        cls, folder: str | Path, model: str, weights: str, dimensions: int, dims: Sequence[int] = (),
        precisions: Sequence[str] = ("float32",),
    ) -> "SearchIndex":  # fmt: skip
        """Return a new, empty index, or the one that is there if it is of the same model, or of any and empty.

        Args:
            model: what loads the model: a folder, remembered by its absolute path, or a Hub id.
            weights: names the model's weights, see `weights_of`.
            dimensions: of the model's vectors.
            dims: numbers of leading dimensions to search by; all of them if empty.
            precisions: "float32" and "int8".

        Raises:
            SearchError: the folder holds something else, an index of another model, or a bad option.
        """
        folder = Path(folder)
        for dim in dims:
            if not 1 <= dim <= dimensions:
                raise SearchError(f"dims must be from 1 to {dimensions}, the model's dimensions, but one is {dim}.")
        for precision in precisions:
            if precision not in PRECISIONS:
                raise SearchError(f"'{precision}' is no precision; it must be one of {', '.join(PRECISIONS)}.")
        forms = [(dim, precision) for dim in (dims or [dimensions]) for precision in precisions]
        if os.path.isdir(os.path.expanduser(model)):
            model = os.path.abspath(os.path.expanduser(model))
        settings = dict(format=FORMAT, model=model, weights=weights, dimensions=dimensions, sources=[], parts=0)
        if (folder / SETTINGS).exists():
            found = cls(folder)
            if len(found):  # said at once, without a wait for another command
                found.require(weights, model)
            with found._alone():
                if (folder / SETTINGS).exists():  # otherwise another command found nothing to index, and deleted it
                    found = cls(folder)
                    if found.weights == weights or len(found):
                        found.require(weights, model)
                        found.model = model
                        found.forms += [form for form in forms if form not in found.forms]
                        found._save()
                        return found
                    for part in found.table.parts:  # nothing was ever indexed, or all was deleted: it binds nobody
                        part.unlink()
                write_settings(folder, {**settings, "forms": forms})
            return cls(folder)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise SearchError(f"'{folder}' holds other files and no index; choose another folder.")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SearchError(f"'{folder}' cannot be made ({error.strerror}); choose another folder.") from error
        write_settings(folder, {**settings, "forms": forms})
        return cls(folder)

    def _save(self) -> None:
        """Write the settings, with what other processes have added to them; only under the lock."""
        there = read_settings(self.folder)
        self.sources = there["sources"] + self.sources[len(there["sources"]) :]
        self.parts = max(self.parts, there["parts"])
        theirs = [(dim, precision) for dim, precision in there["forms"]]
        self.forms = theirs + [form for form in self.forms if form not in theirs]
        self._write()

    def _write(self) -> None:
        settings = dict(
            format=FORMAT, model=self.model, weights=self.weights, dimensions=self.dimensions, forms=self.forms,
            parts=self.parts, sources=self.sources,
        )  # fmt: skip
        write_settings(self.folder, settings)

    def discard_if_empty(self) -> None:
        """Delete the files of an index that holds nothing, so that its folder is bound to no model."""
        with self._alone():
            if len(self):
                return
            for part in self.table.parts:
                part.unlink()
            (self.folder / SETTINGS).unlink(missing_ok=True)
            self._opened = None
            # While it is held: a command that waits for it sees that it is gone, and makes its own.
            (self.folder / ".lock").unlink(missing_ok=True)
            for folder in (self.table.folder, self.folder / "faiss", self.folder):
                if folder.is_dir() and not any(folder.iterdir()):
                    folder.rmdir()

    def require(self, weights: str, model: str) -> None:
        """
        Raises:
            SearchError: the index is of other weights.
        """
        if weights != self.weights:
            raise SearchError(
                f"The index '{self.folder}' was made with '{self.model}' ({self.weights}), and '{model}' has other "
                f"weights ({weights}); their vectors cannot be compared: index again into another folder."
            )

    def __len__(self) -> int:
        return len(self._open().keys)

    def snapshot(self) -> Snapshot:
        """Return the rows as they are now.

        Raises:
            SearchError: if a part is damaged or missing.
        """
        self._require_parts()
        return self.table.open()

    def counts(self) -> dict[str, int]:
        """Rows by kind."""
        return dict(self._open().numbers)

    def options(self, identity: dict[str, Any]) -> dict[str, Any]:
        """Return the options that a source was indexed with the last time; none if it is new."""
        return next((one["options"] for one in self.sources if one["identity"] == identity), {})

    def add(
        self, items: Iterable[Item], encode_text: Callable[[list[str]], np.ndarray],
        encode_image: Callable[[list[Any]], np.ndarray], progress: Callable[[int], None] = lambda done: None,
        origin: Origin | None = None, prune: bool = False,
    ) -> Added:  # fmt: skip
        """Embed what is not in the index yet and write it, part by part: a killed run goes on where it was.

        Afterwards names and captions of what was known are brought up to date.

        Args:
            encode_text, encode_image: to vectors (items, dimensions).
            progress: called with the number of items looked at.
            origin: the source of the items; without one, what the index has and the items lack is never missed.
            prune: delete what the index has of this source and the source has no longer.
        """
        with self._alone():
            self._bind()
            self._tidy()
            lost = self.table.missing(self.parts)
            for name in lost:
                self.table.fill(name)
            before = {key for key, _ in all_places(self.table.open())}
            adding = Adding(self.table, before, Scan(self._number(origin)), encode_text, encode_image, self._wrote)
            done = adding.run(items, progress)
            done.restored = len(lost)
            self._update(adding, origin, prune)
            self._opened = None
            self._open()
        return done

    def _bind(self) -> None:
        """Make sure, under the lock, that no other command deleted the empty index or gave it to another model.

        Raises:
            SearchError: if it is another model's now.
        """
        if not (self.folder / SETTINGS).exists():
            if not self.table.parts:
                self.sources, self.parts = [], 0
            self._write()
            return
        there = SearchIndex(self.folder)
        if there.weights != self.weights:
            there.require(self.weights, self.model)

    def _wrote(self, parts: int) -> None:
        self.parts = max(self.parts, parts)
        self._save()

    def _number(self, origin: Origin | None) -> int:
        """The number of a source; of a new one, remembered from now on."""
        if origin is None:
            return NO_SOURCE
        self.sources = read_settings(self.folder)["sources"]
        known = next((n for n, one in enumerate(self.sources) if one["identity"] == origin.identity), None)
        told = {"identity": origin.identity, "options": origin.options}
        if known is None:
            self.sources.append(told)
            self._save()
            return len(self.sources) - 1
        if self.sources[known] != told:
            sources = [*self.sources[:known], told, *self.sources[known + 1 :]]
            write_settings(self.folder, {**read_settings(self.folder), "sources": sources})
            self.sources = sources
        return known

    def _update(self, adding: Adding, origin: Origin | None, prune: bool) -> None:
        """Bring names and captions up to date, and drop what is replaced or, if so asked, gone."""
        if not adding.scan.names:  # a disk that is not mounted, and not a source that has lost everything
            return
        complete = origin is not None and origin.complete
        unread = adding.unread | (origin.unread if origin is not None else set())
        self.table.rewrite(
            lambda key, kind, places: adding.scan.now(key, kind, places, complete, unread, prune, adding.done)
        )

    def remove(self, names: Sequence[str] = (), source: str | None = None) -> int:
        """Delete what has these names, patterns of names (`photos/*`) or keys, from the files too.

        Content that has other names stays under those.

        Args:
            source: a path or Hub id that was indexed; what came from there is deleted.

        Returns:
            How many rows were deleted.

        Raises:
            SearchError: a name that fits no row, or a source that was not indexed; then nothing is deleted.
        """
        with self._alone():
            self._tidy()
            sources = read_settings(self.folder)["sources"]
            given = (source, os.path.abspath(os.path.expanduser(source))) if source is not None else ()
            numbers = {n for n, one in enumerate(sources) if set(given) & set(one["identity"].get("paths", ()))}
            if source is not None and not numbers:
                known = ", ".join(sorted({str(path) for one in sources for path in one["identity"].get("paths", ())}))
                raise SearchError(f"'{source}' is no source of '{self.folder}'; its sources are {known or 'unknown'}.")
            there = [(key, place.name) for key, places in all_places(self.snapshot()) for place in places]
            for name in names:
                if not any(_fits(name, *one) for one in there):
                    raise SearchError(f"Nothing in '{self.folder}' is called '{name}'; names are those of the hits.")

            def kept(key: str, kind: str, places: list[Place]) -> list[Place]:
                return [
                    place
                    for place in places
                    if place.source not in numbers and not any(_fits(name, key, place.name) for name in names)
                ]

            count = self.table.rewrite(kept)
            self._opened = None
            self._open()
        return count

    def lost_sources(self) -> list[str]:
        """Return the paths that were indexed and do not exist any more."""
        paths = [str(path) for one in self.sources for path in one["identity"].get("paths", ())]
        local = [path for path in paths if os.path.isabs(path) and not any(sign in path for sign in "*?[{")]
        return [path for path in dict.fromkeys(local) if not os.path.exists(path)]

    def search(
        self, vector: np.ndarray, k: int = 10, kinds: Sequence[str] = KINDS, form: tuple[int, str] | None = None
    ) -> list[Hit]:
        """The k nearest items.

        Several kinds are one ranking in which a score counts by how far it is above the scores of its own kind (in
        deviations, over a sample), since texts are more like texts than like the pictures they describe (the modality
        gap, arXiv 2203.02053).

        Args:
            vector: (dimensions,) of the query.
            kinds: what to search for.
            form: dimensions and precision to search by; the most exact one of the index when None.

        Raises:
            SearchError: a bad option, or nothing is indexed.
        """
        kinds = known_kinds(kinds)
        if k < 1:
            raise SearchError(f"The number of hits must be at least 1, but it is {k}.")
        opened = self._open()
        if not len(opened.keys):
            raise SearchError(f"The index '{self.folder}' is empty; add something with bifocal index.")
        dim, precision = form or max(self.forms, key=lambda one: (one[0], one[1] == "float32"))
        if (dim, precision) not in self.forms:
            made = ", ".join(f"{d} {p}" for d, p in self.forms)
            raise SearchError(f"'{self.folder}' has no index of {dim} dimensions in {precision}; it has {made}.")
        query = unit(np.asarray(vector, np.float32))
        if query.shape != (self.dimensions,):
            raise SearchError(f"The query has {query.shape} numbers, but the index has {self.dimensions} dimensions.")
        exact = dim == self.dimensions and precision == "float32"
        hits: list[tuple[float, float, int]] = []
        for kind in kinds:
            rows = self._nearest(opened, query, k if exact else _CANDIDATES * k, kind, dim, precision)
            scores = opened.vectors(rows) @ query
            ranked_by = opened.calibration.ranking_scores(scores, kind, query) if len(kinds) > 1 else scores
            hits += zip(ranked_by.tolist(), scores.tolist(), rows.tolist(), strict=True)
        hits = sorted(hits, key=lambda hit: (-hit[0], hit[2]))[:k]
        return [opened.hit(row, score, standing) for standing, score, row in hits]

    @staticmethod
    def _nearest(opened: Opened, query: np.ndarray, k: int, kind: str, dim: int, precision: str) -> np.ndarray:
        import faiss

        chosen = opened.masks[kind]
        k = min(k, opened.numbers[kind])
        if k == 0:
            return np.empty(0, np.int64)
        selector: Any = faiss.IDSelectorBitmap  # its types are those of the C++ below
        options = cast(Any, faiss).SearchParameters(sel=selector(chosen))
        _, rows = opened.faiss[dim, precision].search(unit(query[:dim])[None], k, params=options)
        return rows[0][rows[0] >= 0]

    def _open(self) -> Opened:
        stamp = self.table.stamp()
        if self._opened is None or self._opened.stamp != stamp:
            self._require_parts()
            self._opened = Opened(self.faiss_folder, self.table, self.forms)
        return self._opened

    def _tidy(self) -> None:
        """Delete what killed runs left half written; only under the lock."""
        self.table.tidy()
        for left in self.faiss_folder.glob(".*.faiss.*"):
            left.unlink(missing_ok=True)

    def _require_parts(self) -> None:
        lost = self.table.missing(self.parts)
        if lost:
            which = "is" if len(lost) == 1 else f"and {len(lost) - 1} more are"
            raise SearchError(
                f"'{self.table.folder / lost[0]}' {which} missing. Put it back, or run bifocal index again with the "
                "index's sources, which embeds its items again."
            )

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Let commands that change one index take turns."""
        from filelock import FileLock, Timeout

        patience = _PATIENCE
        while True:
            lock = FileLock(self.folder / ".lock")
            try:
                lock.acquire(timeout=patience)
                break
            except Timeout:
                logger.warning(f"Another command is changing '{self.folder}'; waiting until it has ended.")
                patience = -1
            except FileNotFoundError:  # the other one found nothing to index, and deleted the folder
                self.folder.mkdir(parents=True, exist_ok=True)
        try:
            yield
        finally:
            lock.release()


def weights_of(model: str | Path) -> str:
    """A short name of a model's weights: the same for the same files, whatever the folder is called.

    Raises:
        SearchError: there are no weights.
    """
    folder = Path(model).expanduser()
    if not folder.exists():
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(str(model), allow_patterns=["*.safetensors", "*.json"]))
        except (OSError, ValueError) as error:
            said = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise SearchError(f"There is no model at '{model}', here or on the Hub ({said}).") from error
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise SearchError(f"'{model}' has no safetensors; give the folder or Hub id of a Bifocal model.")
    digest = hashlib.blake2b(digest_size=8)
    for file in files:
        with file.open("rb") as opened:
            while block := opened.read(2**22):
                digest.update(block)
    return digest.hexdigest()


def _fits(given: str, key: str, name: str) -> bool:
    return given in (key, name) or (any(sign in given for sign in "*?[") and fnmatchcase(name, given))
