"""Inspect a source: rows, lengths, sizes, duplicates, skipped rows and their causes, and a sample."""

import base64
import io
import random
from collections import Counter
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from PIL import Image

from bifocal.data.filters import comparable_text, image_size, read_image_bytes, require_readable
from bifocal.data.loading import iter_rows
from bifocal.data.near_duplicates import (
    IMAGE_DISTANCE,
    TEXT_SIMILARITY,
    near_duplicate_images,
    near_duplicate_texts,
)
from bifocal.data.signatures import TEXT_COLUMNS, Signatures, SignedImage, digest_of, sign_image, sign_texts
from bifocal.data.skips import RowError
from bifocal.data.source import Source

_SAMPLE = 24
_NAMED = 5  # example rows per cause
_THUMBNAIL = 112  # pixels
_SMALL = 64  # pixels; each inspected image is kept in this size until its near-duplicates are known


@dataclass
class Inspection:
    """What a source holds, in numbers.

    Args:
        title, kind: title and kind of the source.
        rows, good: numbers of inspected and of usable rows.
        complete: whether these are all rows of the source.
        skipped: for each cause the number of rows, whether a filter removed them, and examples (name, detail).
        lengths: characters of every text, by column.
        sizes: width and height of every image.
        megabytes: size of all image files.
        counts: captions of each image, or negatives of each row.
        duplicates: numbers of rows with an image, or with texts, of an earlier row, filtered or not.
        near_duplicates: for images and texts, how many rows are near-duplicates of an earlier row that differs, and
            examples, each with the later row and the earlier one as in `sample`.
        sample: rows drawn at random, each with `name`, `texts` (column, text) and perhaps `thumbnail`, a data URI.
    """

    title: str
    kind: str
    rows: int = 0
    good: int = 0
    complete: bool = True
    skipped: list[dict[str, Any]] = field(default_factory=list)
    lengths: dict[str, list[int]] = field(default_factory=dict)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    megabytes: float = 0.0
    counts: list[int] = field(default_factory=list)
    duplicates: dict[str, int] = field(default_factory=dict)
    near_duplicates: dict[str, dict[str, Any]] = field(default_factory=dict)
    sample: list[dict[str, Any]] = field(default_factory=list)


def inspect_source(source: Source, kind: str, max_rows: int | None = 10_000, seed: int = 0) -> Inspection:
    """Inspect the first rows of a source, with images decoded.

    Args:
        max_rows: number of rows to inspect; None means all.
        seed: seed of the sample.

    Raises:
        DataError: if the source cannot be read.
    """
    inspection = Inspection(source.title, kind)
    draws = random.Random(seed)
    row_errors: dict[tuple[str, bool], list[tuple[str, str]]] = {}
    causes: Counter[tuple[str, bool]] = Counter()
    seen: dict[str, set[bytes]] = {"images": set(), "texts": set()}
    sample: list[tuple[str, dict[str, Any]]] = []
    compared = _Compared()
    rows = iter_rows(source, kind)
    for name, row in islice(rows, max_rows):
        inspection.rows += 1
        if not isinstance(row, RowError):
            try:
                _measure(inspection, row, seen)
                compared.add(name, row)
            except RowError as row_error:
                row = row_error
        if isinstance(row, RowError):
            key = (row.cause, row.filtered)
            causes[key] += 1
            if len(row_errors.setdefault(key, [])) < _NAMED:
                row_errors[key].append((name, row.detail))
            continue
        inspection.good += 1
        slot = len(sample) if len(sample) < _SAMPLE else draws.randrange(inspection.good)
        if slot < _SAMPLE:
            sample[slot : slot + 1] = [(name, row)]
    inspection.complete = next(rows, None) is None
    inspection.skipped = [
        {"cause": cause, "filtered": filtered, "count": count, "rows": row_errors[cause, filtered]}
        for (cause, filtered), count in causes.most_common()
    ]
    inspection.sample = [_shown(name, row) for name, row in sample]
    inspection.near_duplicates = compared.near_duplicates()
    return inspection


class _Compared:
    """Signatures of the rows inspected so far, and what shows a row again."""

    def __init__(self) -> None:
        self.signed: list[SignedImage] = []
        self.written: dict[str, list[str]] = {}
        self.names: list[str] = []
        self.thumbnails: list[str] = []

    def add(self, name: str, row: dict[str, Any]) -> None:
        """Add a row.

        Raises:
            RowError: if its image cannot be read.
        """
        if "image" in row:
            data = read_image_bytes(row["image"])
            self.signed.append(sign_image(data))
            self.thumbnails.append(_thumbnail(data, _SMALL))
        self.names.append(name)
        for column in TEXT_COLUMNS:
            if column in row:
                self.written.setdefault(column, []).append(comparable_text(row[column]))

    def near_duplicates(self) -> dict[str, dict[str, Any]]:
        """Return the counts and examples; equal images and texts are counted elsewhere."""
        signatures = Signatures.of_images(self.names, self.signed)
        counted: dict[str, dict[str, Any]] = {}
        if self.signed:
            groups = near_duplicate_images(signatures, IMAGE_DISTANCE)
            signed = self.signed
            differing = [pair for pair in groups.items() if signed[pair[0]].digest != signed[pair[1]].digest]
            counted["images"] = self._counted(differing)
        if self.written:
            signatures.texts = {column: sign_texts(values) for column, values in self.written.items()}
            groups = near_duplicate_texts(signatures, TEXT_SIMILARITY)
            columns = self.written.values()
            differing = [pair for pair in groups.items() if any(c[pair[0]] != c[pair[1]] for c in columns)]
            counted["texts"] = self._counted(differing)
        return counted

    def _counted(self, pairs: list[tuple[int, int]]) -> dict[str, Any]:
        step = max(1, len(pairs) // _NAMED)  # from all over the source
        return {"count": len(pairs), "pairs": [tuple(map(self._shown, pair)) for pair in pairs[::step][:_NAMED]]}

    def _shown(self, number: int) -> dict[str, Any]:
        texts = [(column, values[number]) for column, values in self.written.items()]
        shown: dict[str, Any] = {"name": self.names[number], "texts": texts}
        return {**shown, "thumbnail": self.thumbnails[number]} if self.thumbnails else shown


def _measure(inspection: Inspection, row: dict[str, Any], seen: dict[str, set[bytes]]) -> None:
    """Add a row to the numbers.

    Raises:
        RowError: if the image cannot be read.
    """
    texts = {column: value for column, value in row.items() if column not in ("image", "image_id")}
    if "image" in row:
        data = read_image_bytes(row["image"])
        require_readable(data)
        inspection.sizes.append(image_size(data))
        inspection.megabytes += len(data) / 1e6
        _repeated(inspection, seen, "images", data)
        if "caption" in row:
            inspection.counts.append(len(row["caption"]) if isinstance(row["caption"], list) else 1)
    if "negatives" in row:
        inspection.counts.append(len(row["negatives"]))
    for column, value in texts.items():
        if isinstance(value, float):  # a score
            continue
        lengths = inspection.lengths.setdefault(column, [])
        lengths.extend(len(text) for text in (value if isinstance(value, list) else [value]))
    written = [comparable_text(value) for value in texts.values() if not isinstance(value, float)]
    if written and "label" not in row:
        _repeated(inspection, seen, "texts", "\0".join(written).encode())


def _repeated(inspection: Inspection, seen: dict[str, set[bytes]], what: str, value: bytes) -> None:
    key = digest_of(value)
    inspection.duplicates[what] = inspection.duplicates.get(what, 0) + (key in seen[what])
    seen[what].add(key)


def _shown(name: str, row: dict[str, Any]) -> dict[str, Any]:
    texts = []
    for column, value in row.items():
        if column in ("image", "image_id"):
            continue
        texts += [(column, str(text)) for text in (value if isinstance(value, list) else [value])]
    shown: dict[str, Any] = {"name": name, "texts": texts}
    if "image" in row:
        shown["thumbnail"] = _thumbnail(row["image"])
    return shown


def _thumbnail(value: Any, side: int = _THUMBNAIL) -> str:
    from bifocal.modeling import load_image

    image = load_image(value)
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
