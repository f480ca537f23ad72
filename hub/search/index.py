"""An index: the table of a model's vectors, FAISS indexes of them, and the model they came from."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, cast

import numpy as np

from bifocal.hub.search.items import KINDS, Hit, Item, SearchError, known_kinds, read_picture, thumbnail, unit
from bifocal.hub.search.table import ROWS, Table

_FORMAT = 1
_SETTINGS = "index.json"
_PRECISIONS = ("float32", "int8")
_CANDIDATES = 4  # times the hits wanted are taken from a shortened or rounded index, then scored with whole vectors
_SAMPLE = 1024  # items of a kind by which scores are made comparable
_FEW = 8  # items of a kind below which its mean and deviation say nothing


@dataclass
class Added:
    """What became of the items given.

    Args:
        count: new rows.
        known: items whose content was in the index already, or came before.
        failed: name and reason of pictures that cannot be read.
    """

    count: int = 0
    known: int = 0
    failed: list[tuple[str, str]] = field(default_factory=list)


class SearchIndex:
    """A folder of `index.json`, `table/` and `faiss/`.

    Each FAISS index (a number of dimensions and a precision) is derived from the table and made anew where it does not
    fit. Those of all dimensions in float32 are exact; from others four times the hits wanted are taken and scored with
    the whole vectors.

    Args:
        folder: of an index.

    Raises:
        SearchError: there is none, or one of another version.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        path = self.folder / _SETTINGS
        if not path.exists():
            raise SearchError(f"'{folder}' is no index; make one with bifocal index.")
        settings = json.loads(path.read_text(encoding="utf-8"))
        if settings.get("format") != _FORMAT:
            raise SearchError(f"'{folder}' was made by another version of Bifocal; index anew into another folder.")
        self.model: str = settings["model"]
        self.weights: str = settings["weights"]
        self.dimensions: int = settings["dimensions"]
        self.forms: list[tuple[int, str]] = [(dim, precision) for dim, precision in settings["forms"]]
        self.table = Table(self.folder / "table", self.dimensions)
        self._opened: _Opened | None = None

    @classmethod
    def create(
        cls, folder: str | Path, model: str, weights: str, dimensions: int, dims: Sequence[int] = (),
        precisions: Sequence[str] = ("float32",),
    ) -> "SearchIndex":  # fmt: skip
        """A new, empty index, or the one that is there if it is of the same model.

        Args:
            model: what loads the model: a folder or Hub id.
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
            if precision not in _PRECISIONS:
                raise SearchError(f"'{precision}' is no precision; it must be one of {', '.join(_PRECISIONS)}.")
        forms = [[dim, precision] for dim in (dims or [dimensions]) for precision in precisions]
        if (folder / _SETTINGS).exists():
            found = cls(folder)
            found.require(weights, model)
            wanted = [form for form in forms if tuple(form) not in found.forms]
            forms = [list(form) for form in found.forms] + wanted
        elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise SearchError(f"'{folder}' holds other files and no index; choose another folder.")
        folder.mkdir(parents=True, exist_ok=True)
        settings = dict(format=_FORMAT, model=model, weights=weights, dimensions=dimensions, forms=forms)
        _write(folder / _SETTINGS, settings)
        return cls(folder)

    def require(self, weights: str, model: str) -> None:
        """
        Raises:
            SearchError: the index is of other weights.
        """
        if weights != self.weights:
            raise SearchError(
                f"The index '{self.folder}' was made with '{self.model}' ({self.weights}), and '{model}' has other "
                f"weights ({weights}); their vectors cannot be compared: index anew into another folder."
            )

    def __len__(self) -> int:
        return len(self._open().keys)

    def counts(self) -> dict[str, int]:
        """Rows by kind."""
        kinds = self._open().kinds
        return {kind: int((kinds == kind).sum()) for kind in KINDS}

    def add(
        self, items: Iterable[Item], encode_text: Callable[[list[str]], np.ndarray],
        encode_image: Callable[[list[Any]], np.ndarray], progress: Callable[[int], None] = lambda done: None,
    ) -> Added:  # fmt: skip
        """Embed what is not in the index yet and write it, part by part: a killed run goes on where it was.

        Args:
            encode_text, encode_image: to vectors (items, dimensions).
            progress: called with the number of items looked at.
        """
        done = Added()
        with self._alone():
            known = set(self._open().keys)
            waiting: list[tuple[str, Item]] = []
            for number, item in enumerate(items, 1):
                try:
                    key = item.key()
                except SearchError as error:
                    done.failed.append((item.name, str(error)))
                    continue
                if key in known:
                    done.known += 1
                else:
                    known.add(key)
                    waiting.append((key, item))
                if len(waiting) == ROWS:
                    self._write(waiting, encode_text, encode_image, done)
                    waiting = []
                progress(number)
            self._write(waiting, encode_text, encode_image, done)
            self._opened = None
            self._open()
        return done

    def _write(self, waiting: Sequence[tuple[str, Item]], encode_text: Any, encode_image: Any, done: Added) -> None:
        rows: list[dict[str, Any]] = []
        pictures = []
        for key, item in waiting:
            row: dict[str, Any] = {"key": key, "kind": item.kind, "name": item.name, "text": item.text, "image": None}
            if item.image is not None:
                try:
                    picture = read_picture(item.image)
                except SearchError as error:
                    done.failed.append((item.name, str(error)))
                    continue
                pictures.append(picture)
                row["image"] = {"bytes": thumbnail(picture), "path": None}
            rows.append(row)
        texts = [row["text"] for row in rows if row["kind"] == "text"]
        found = {
            "text": iter(unit(encode_text(texts)) if texts else ()),
            "image": iter(unit(encode_image(pictures)) if pictures else ()),
        }
        for row in rows:
            row["embedding"] = next(found[row["kind"]]).astype(np.float32)
        if rows:
            self.table.append(rows)
            done.count += len(rows)

    def remove(self, names: Sequence[str]) -> int:
        """Delete rows by name, pattern of names (`photos/*`) or key, from the files too.

        Returns:
            How many.

        Raises:
            SearchError: a name that fits no row; then nothing is deleted.
        """
        with self._alone():
            opened = self._open()
            for name in names:
                if not any(_fits(name, *row) for row in zip(opened.keys, opened.names)):
                    raise SearchError(f"Nothing in '{self.folder}' is called '{name}'; names are those of the hits.")
            count = self.table.remove(lambda key, name: any(_fits(given, key, name) for given in names))
            self._opened = None
            self._open()
        return count

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
            mean, deviation = opened.usual(kind, query) if len(kinds) > 1 else (0.0, 1.0)
            hits += [(float((score - mean) / deviation), float(score), int(row)) for score, row in zip(scores, rows)]
        hits = sorted(hits, key=lambda hit: (-hit[0], hit[2]))[:k]
        return [opened.hit(row, score, standing) for standing, score, row in hits]

    @staticmethod
    def _nearest(opened: "_Opened", query: np.ndarray, k: int, kind: str, dim: int, precision: str) -> np.ndarray:
        import faiss

        chosen = opened.masks[kind]
        k = min(k, opened.numbers[kind])
        if k == 0:
            return np.empty(0, np.int64)
        selector: Any = faiss.IDSelectorBitmap  # its types are those of the C++ below
        options = cast(Any, faiss).SearchParameters(sel=selector(chosen))
        _, rows = opened.faiss[dim, precision].search(unit(query[:dim])[None], k, params=options)
        return rows[0][rows[0] >= 0]

    def _open(self) -> "_Opened":
        stamp = self.table.stamp()
        if self._opened is None or self._opened.stamp != stamp:
            self._opened = _Opened(self, stamp)
        return self._opened

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Two commands that change one index take turns."""
        from filelock import FileLock

        with FileLock(self.folder / ".lock"):
            yield


class _Opened:
    """What searching needs of a table as it is now; not changed after it is made, so that threads share it."""

    def __init__(self, index: SearchIndex, stamp: list[list[Any]]) -> None:
        self.stamp = stamp
        data = index.table.open()
        # Arrow's own table: a data set takes milliseconds for each row, Arrow microseconds.
        self.arrow: Any = None if data is None else data.data
        self.keys: list[str] = [] if data is None else list(data["key"])
        self.names: list[str] = [] if data is None else list(data["name"])
        self.kinds = np.array([] if data is None else data["kind"], dtype=object)
        self.masks = {kind: np.packbits(self.kinds == kind, bitorder="little") for kind in KINDS}
        self.numbers = {kind: int((self.kinds == kind).sum()) for kind in KINDS}
        self.faiss = {form: _faiss(index, *form, stamp) for form in index.forms} if self.keys else {}
        generator = np.random.default_rng(0)
        self.samples: dict[str, np.ndarray] = {}
        for kind in KINDS:
            rows = np.flatnonzero(self.kinds == kind)
            if len(rows) >= _FEW:
                chosen = generator.choice(rows, min(_SAMPLE, len(rows)), replace=False)
                self.samples[kind] = self.vectors(np.sort(chosen))

    def vectors(self, rows: np.ndarray) -> np.ndarray:
        """(rows, dimensions), the vectors of some rows."""
        column = self.arrow.column("embedding")
        if not len(rows):
            return np.empty((0, column.type.list_size), np.float32)
        return np.stack([column[int(row)].values.to_numpy() for row in rows])

    def usual(self, kind: str, query: np.ndarray) -> tuple[float, float]:
        """Mean and deviation of a query's scores with a kind; 0 and 1 where a kind has too few items to tell."""
        if len(self.samples) < len(KINDS):
            return 0.0, 1.0
        scores = self.samples[kind] @ query
        return float(scores.mean()), max(float(scores.std()), 1e-6)

    def hit(self, row: int, score: float, standing: float) -> Hit:
        picture = self.arrow.column("image")[row].as_py()
        text = self.arrow.column("text")[row].as_py()
        return Hit(
            self.names[row], str(self.kinds[row]), text, score, standing, None if picture is None else picture["bytes"]
        )


def _faiss(index: SearchIndex, dim: int, precision: str, stamp: list[list[Any]]) -> Any:
    """The FAISS index of the table as it is: read if it fits, else made anew and kept."""
    import faiss

    folder = index.folder / "faiss"
    path, told = folder / f"{dim}-{precision}.faiss", folder / f"{dim}-{precision}.json"
    if path.exists() and told.exists() and json.loads(told.read_text(encoding="utf-8")) == stamp:
        return faiss.read_index(str(path))
    folder.mkdir(exist_ok=True)
    made: Any
    if precision == "float32":
        made = faiss.IndexFlatIP(dim)
    else:
        made = faiss.IndexScalarQuantizer(dim, faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT)
    for vectors in index.table.vectors():
        short = np.ascontiguousarray(unit(vectors[:, :dim]))
        if not made.is_trained:  # the range of each dimension, by the first part
            made.train(short)
        made.add(short)
    told.unlink(missing_ok=True)
    scratch = folder / f".{path.name}"
    faiss.write_index(made, str(scratch))
    os.replace(scratch, path)
    _write(told, stamp)
    return made


def weights_of(model: str | Path) -> str:
    """A short name of a model's weights: the same for the same files, whatever the folder is called.

    Raises:
        SearchError: there are no weights.
    """
    folder = Path(model)
    if not folder.exists():
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(str(model), allow_patterns=["*.safetensors", "*.json"]))
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


def _write(path: Path, value: Any) -> None:
    scratch = path.with_name(f".{path.name}")
    scratch.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    os.replace(scratch, path)
