"""Turn a row of any source into a normalised row of a kind."""

import base64
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from bifocal.data.kinds import KINDS
from bifocal.data.paths import AllowedRoots, is_remote
from bifocal.data.skips import RowError
from bifocal.data.text_files import OTHER_ENCODING

# Names that a source may use for each of our columns, in the order of the search: sentence-transformers' names for
# texts; those of LAION, img2dataset, imagefolder and the Hub's captioned images for images.
NAMES: dict[str, tuple[str, ...]] = {
    "image": ("image", "file_name", "image_path", "filepath", "path"),
    "caption": ("caption", "captions", "txt", "text", "json.caption"),
    "image_id": ("image_id",),
    "query": ("query", "anchor", "question"),
    "positive": ("positive", "answer"),
    "negatives": ("negatives", "negative"),
    "text": ("text",),
    "label": ("label", "class", "cls"),
    "first": ("sentence1", "text1", "first"),
    "second": ("sentence2", "text2", "second"),
    "score": ("score", "label"),
}
DPR_NEGATIVES = 7  # of the hundred per row in DPR's files, if a source does not set num_negatives
_NUMBERED = re.compile(r"negative_(\d+)$")
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_SURROGATE = re.compile(r"[\ud800-\udfff]")
_BYTES = re.compile(r"[\udc80-\udcff]")  # what readers put in place of bytes that they cannot decode
_BASE64_IMAGES = ("/9j/", "iVBORw0KGgo", "R0lGOD", "UklGR", "Qk0", "SUkq", "TU0AK")  # JPEG, PNG, GIF, WebP, BMP, TIFF
_SHORTEST_BASE64 = 100  # characters; a shorter text is a path
_LONGEST_PATH = 4096


def as_list(value: Any) -> Any:
    """Return an array, tuple or other sequence as a list; strings and all other values as they are."""
    if isinstance(value, str | bytes):
        return value
    if hasattr(value, "tolist"):
        return value.tolist()
    return list(value) if isinstance(value, Sequence) else value


class RowNormaliser:
    """Turns a row of a source into a row of a kind.

    - image-text: `image` (bytes, or the path of a file within the allowed roots), `caption` (a string or a list of
      them) and `image_id`, equal for rows that show the same image;
    - text-pair: `query`, `positive`; text-triplet: also `negatives`, one at least;
    - text-only: `text`; image-only: `image` and `image_id`;
    - image-label: `image`, `label`, a string; scored-pair: `first`, `second`, `score`, a number.

    Args:
        kind: kind of the rows.
        columns: the source's column for each of ours that is not found by `NAMES`; `json.FIELD` is a field of a
            sample's JSON.
        allowed_roots: folders below which images may be read.
        negatives: hard negatives per row; rows with fewer are bad, further ones are cut. None takes all.
    """

    def __init__(
        self,
        kind: str,
        columns: Mapping[str, str] = {},
        allowed_roots: AllowedRoots | None = None,
        negatives: int | None = None,
    ) -> None:
        self.kind = kind
        self.columns = dict(columns)
        self.allowed_roots = allowed_roots or AllowedRoots(None)
        self.negatives = negatives

    def __call__(self, name: str, raw: Mapping[str, Any], folder: str | None = None) -> dict[str, Any]:
        """Return a row of the kind.

        Args:
            name: name of the row, the `image_id` of an image without another one.
            folder: folder that a relative image path starts from; None for that of the allowed roots.

        Raises:
            RowError: if a column is missing or its value cannot be used.
        """
        row: dict[str, Any] = {}
        for column in KINDS[self.kind]:
            if column == "image":
                row["image"], where = self._image(raw, folder)
                known = self._find("image_id", raw, required=False)
                row["image_id"] = str(where or name if known is None else known)
            elif column in ("label", "score"):
                row[column] = self._plain(column, raw)
            else:
                row[column] = self._negatives(raw) if column == "negatives" else self.texts(column, raw)
        return row

    def column_of(self, column: str, names: Iterable[str]) -> str | None:
        """Return which of a source's columns is read as ours; None if there is none."""
        names = list(names)
        return self.columns.get(column) or next((name for name in NAMES[column] if name in names), None)

    def _find(self, column: str, raw: Mapping[str, Any], required: bool = True) -> Any:
        mapped = self.columns.get(column)
        for name in (mapped,) if mapped else NAMES[column]:
            if name in raw:
                return raw[name]
            outer, dot, inner = name.partition(".")
            if dot and isinstance(raw.get(outer), Mapping) and inner in raw[outer]:
                return raw[outer][inner]
        if required:
            has = ", ".join(map(str, list(raw)[:12]))
            raise RowError(f"no {column}", f"there is no column '{mapped or column}' (there are {has})")
        return None

    @staticmethod
    def _fetched(address: str) -> bytes:
        """Return the bytes of an image that a streamed data set of the Hub names by an address."""
        import fsspec

        try:
            with fsspec.open(address, "rb") as file:
                return file.read()
        except Exception as error:  # each protocol has its own
            raise RowError("missing image", str(error)[:300]) from error

    def texts(self, column: str, raw: Mapping[str, Any]) -> str | list[str]:
        """Return the text or texts of a column; those of a struct that is mapped to it, such as names by language.

        Raises:
            RowError: if the row has none, or none that can be used.
        """
        value = self._find(column, raw)
        if isinstance(value, Mapping) and column in self.columns:
            value = [text for text in value.values() if text is not None]
        if isinstance(value, list):
            if not value:
                raise RowError(f"no {column}", "an empty list")
            return [_text(column, text) for text in value]
        return _text(column, value)

    def _plain(self, column: str, raw: Mapping[str, Any]) -> Any:
        """Return a label as a string, or a score as a number."""
        value = self._find(column, raw)
        if column == "label":
            # Unlabelled splits of the Hub have -1.
            if isinstance(value, str | int) and value != -1 and str(value).strip():
                return str(value).strip()
            raise RowError("no label", f"{value!r:.100}")
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise RowError("no score", f"{value!r:.100} is not a number") from None
        if not math.isfinite(number):
            raise RowError("no score", f"{number} is not finite")
        return number

    def _negatives(self, raw: Mapping[str, Any]) -> list[str]:
        numbered = sorted((int(m[1]), m[0]) for m in map(_NUMBERED.match, raw) if m)
        value: Any = self._find("negatives", raw, required=not numbered)
        values = list(value) if isinstance(value, list | tuple) else [] if value is None else [value]
        if "negatives" not in self.columns:
            values += [raw[name] for _, name in numbered if raw[name] is not None]
        negatives = [_text("negatives", text) for text in values]
        wanted = self.negatives
        if len(negatives) < (wanted or 1):
            raise RowError("too few negatives", f"{len(negatives)} of {wanted or 1}")
        return negatives[:wanted]

    def _image(self, raw: Mapping[str, Any], folder: str | None) -> tuple[Any, str | None]:
        """Return the image as bytes or path, and its id if it has a path."""
        value = self._find("image", raw)
        if isinstance(value, Mapping):  # an undecoded `datasets.Image`
            value = value.get("bytes") if value.get("bytes") is not None else value.get("path")
        if isinstance(value, bytes | bytearray):
            if not value:
                raise RowError("no image", "0 bytes")
            return bytes(value), None
        if isinstance(value, str) and value.strip():
            content = _embedded(value)
            if content is not None:
                return content, None
            if len(value) > _LONGEST_PATH:
                raise RowError("no image", f"a text of {len(value):,} characters is not a path: {value[:40]!r}...")
            if _CONTROL.search(value):
                raise RowError("control characters", f"in the path {value[:200]!r}")
            path = self.allowed_roots.resolve(value, folder)
            return (self._fetched(path) if is_remote(path) else path), path
        if value is None or isinstance(value, str):
            raise RowError("no image", "the cell is empty")
        raise RowError("no image", f"it is neither bytes nor a path, but of type {type(value).__name__}")


def _embedded(value: str) -> bytes | None:
    """Return the image that a text holds in base64, as a data URI or bare, as some tables have it; None for a path."""
    content = value.partition(",")[2] if value[:5].lower() == "data:" else value
    if content is value and (len(value) < _SHORTEST_BASE64 or not value.startswith(_BASE64_IMAGES)):
        return None
    try:
        return base64.b64decode("".join(content.split()), validate=True)
    except ValueError as error:
        raise RowError("no image", f"{len(value):,} characters that are not base64 ({error})") from error


def has_column(column: str, names: Iterable[str]) -> bool:
    """Return whether a source with columns of these names has one for ours."""
    names = list(names)
    numbered = column == "negatives" and any(map(_NUMBERED.match, names))
    return numbered or any(name.partition(".")[0] in names for name in NAMES[column])


def _text(column: str, value: Any) -> str:
    if not isinstance(value, str):
        raise RowError(f"no {column}", f"a {type(value).__name__} is not text")
    if not value.strip():
        raise RowError(f"no {column}", "an empty text")
    if _SURROGATE.search(value):
        remedy = f"; {OTHER_ENCODING}" if _BYTES.search(value) else ""
        raise RowError("not UTF-8", f"in {column}: {value[:100]!r}{remedy}")
    if _CONTROL.search(value):
        raise RowError("control characters", f"in {column}: {value[:100]!r}")
    return value.strip()


ColumnLayout = Callable[[Mapping[str, Any]], Mapping[str, Any]]


def sharegpt4v(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return ShareGPT4V's (arXiv 2311.12793) image with the model's answers as captions, without the image token."""
    turns = raw.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise RowError("no caption", "no conversations")
    answers = [
        str(turn.get("value", "")) for turn in turns
        if isinstance(turn, Mapping) and turn.get("from") in ("gpt", "assistant")
    ]  # fmt: skip
    captions = [text for text in (re.sub(r"\s*<image>\s*", " ", answer).strip() for answer in answers) if text]
    if not captions:
        raise RowError("no caption", "no answer in the conversations")
    return {"image": raw.get("image"), "caption": captions[0] if len(captions) == 1 else captions}


def dpr(raw: Mapping[str, Any], negatives: int | None = None) -> dict[str, Any]:
    """Return a row of DPR's Natural Questions (arXiv 2004.04906): the first positive, hard negatives before others."""
    positives = raw.get("positive_ctxs") or []
    if not positives:
        raise RowError("no positive", "no positive_ctxs")
    others = [*(raw.get("hard_negative_ctxs") or []), *(raw.get("negative_ctxs") or [])]
    return {
        "query": raw.get("question"),
        "positive": passage(positives[0]),
        "negatives": [passage(other) for other in others[: negatives or DPR_NEGATIVES]],
    }


def passage(document: Mapping[str, Any]) -> str:
    """Return title and text, joined as BEIR does."""
    return f"{document.get('title') or ''} {document.get('text') or ''}".strip()


def as_is(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a row of no published layout unchanged."""
    return raw


COLUMN_LAYOUTS: dict[str, ColumnLayout] = {"sharegpt4v": sharegpt4v, "dpr": dpr}


def detect_layout(raw: Mapping[str, Any]) -> str | None:
    """Return the published layout that a row has, by its columns; None for others."""
    if "conversations" in raw and "image" in raw:
        return "sharegpt4v"
    if "positive_ctxs" in raw:
        return "dpr"
    if {"gold_label", "sentence1", "sentence2"} <= set(raw) or {"premise", "hypothesis", "label"} <= set(raw):
        return "nli"
    return None
