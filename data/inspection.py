"""What a source holds, in figures: rows, lengths, sizes, duplicates, what is left out and why, and a sample."""

import base64
import hashlib
import io
import json
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from PIL import Image

from bifocal.data.filters import content, require_readable, same, size_of
from bifocal.data.loading import load_source, open_stream
from bifocal.data.skips import FAULT, Fault
from bifocal.data.source import Source
from bifocal.modeling import load_image

_SAMPLE = 24
_NAMED = 5  # rows named for each cause
_THUMBNAIL = 112  # pixels


@dataclass
class Inspection:
    """
    Args:
        title, kind: of the source.
        rows, good: looked at, and usable.
        complete: whether these are all.
        left_out: for each cause how many, whether a filter dropped them, and some of them: (name, detail).
        lengths: characters of every text, by column.
        sizes: width and height of every picture.
        megabytes: of the pictures' files.
        counts: captions of each picture, or negatives of each row.
        duplicates: rows whose picture, or whose texts, came before; they are counted, whether dropped or not.
        sample: rows drawn at random, each with `name`, `texts` (column, text) and perhaps `thumbnail`, a data URI.
    """

    title: str
    kind: str
    rows: int = 0
    good: int = 0
    complete: bool = True
    left_out: list[dict[str, Any]] = field(default_factory=list)
    lengths: dict[str, list[int]] = field(default_factory=dict)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    megabytes: float = 0.0
    counts: list[int] = field(default_factory=list)
    duplicates: dict[str, int] = field(default_factory=dict)
    sample: list[dict[str, Any]] = field(default_factory=list)


def inspect_source(source: Source, kind: str, most: int | None = 10_000, seed: int = 0) -> Inspection:
    """Look at a source's first rows, pictures decoded.

    Args:
        most: rows to look at; None means all.
        seed: of the sample.

    Raises:
        DataError: there is no such source.
    """
    found = Inspection(source.title, kind)
    draws = random.Random(seed)
    faults: dict[tuple[str, bool], list[tuple[str, str]]] = {}
    causes: Counter[tuple[str, bool]] = Counter()
    seen: dict[str, set[bytes]] = {"pictures": set(), "texts": set()}
    sample: list[tuple[str, dict[str, Any]]] = []
    rows = rows_of(source, kind)
    for name, row in islice(rows, most):
        found.rows += 1
        if not isinstance(row, Fault):
            try:
                _measure(found, row, seen)
            except Fault as fault:
                row = fault
        if isinstance(row, Fault):
            key = (row.cause, row.dropped)
            causes[key] += 1
            if len(faults.setdefault(key, [])) < _NAMED:
                faults[key].append((name, row.detail))
            continue
        found.good += 1
        place = len(sample) if len(sample) < _SAMPLE else draws.randrange(found.good)
        if place < _SAMPLE:
            sample[place : place + 1] = [(name, row)]
    found.complete = next(rows, None) is None
    found.left_out = [
        {"cause": cause, "dropped": dropped, "count": count, "rows": faults[cause, dropped]}
        for (cause, dropped), count in causes.most_common()
    ]
    found.sample = [_shown(name, row) for name, row in sample]
    return found


def rows_of(source: Source, kind: str) -> Iterator[tuple[str, dict[str, Any] | Fault]]:
    """Every row of a source with its name, good or not, in its order."""
    stream = open_stream(source, kind)
    if stream is not None:
        yield from stream.rows()
        return
    if source.clean is None or not source.clean.needs_whole:
        source = source.model_copy(update={"streaming": source.path != "symbols"})
    for number, row in enumerate(load_source(source, kind)):
        fault = row.pop(FAULT, None)
        if fault is not None:
            name, cause, detail, dropped, shard = json.loads(fault)
            yield name, Fault(cause, detail, dropped, shard)
            continue
        image = row.get("image")
        if isinstance(image, list):
            image = image[0]
        if isinstance(image, dict):
            row["image"] = image["bytes"] if image["bytes"] is not None else image["path"]
        name = f"{source.title}:{number}"
        if image is not None:
            row.setdefault("image_id", name)
        yield name, row


def _measure(found: Inspection, row: dict[str, Any], seen: dict[str, set[bytes]]) -> None:
    """
    Raises:
        Fault: the picture cannot be read.
    """
    texts = {column: value for column, value in row.items() if column not in ("image", "image_id")}
    if "image" in row:
        data = content(row["image"])
        require_readable(data)
        found.sizes.append(size_of(data))
        found.megabytes += len(data) / 1e6
        _repeated(found, seen, "pictures", data)
        if "caption" in row:
            found.counts.append(len(row["caption"]) if isinstance(row["caption"], list) else 1)
    if "negatives" in row:
        found.counts.append(len(row["negatives"]))
    for column, value in texts.items():
        if isinstance(value, float):  # a score
            continue
        lengths = found.lengths.setdefault(column, [])
        lengths.extend(len(text) for text in (value if isinstance(value, list) else [value]))
    written = [same(value) for value in texts.values() if not isinstance(value, float)]
    if written and "label" not in row:
        _repeated(found, seen, "texts", "\0".join(written).encode())


def _repeated(found: Inspection, seen: dict[str, set[bytes]], what: str, value: bytes) -> None:
    key = hashlib.blake2b(value, digest_size=16).digest()
    found.duplicates[what] = found.duplicates.get(what, 0) + (key in seen[what])
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


def _thumbnail(value: Any) -> str:
    picture = load_image(value)
    picture.thumbnail((_THUMBNAIL, _THUMBNAIL), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
