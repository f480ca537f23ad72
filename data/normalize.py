"""The one normalised row of each kind, made of whatever columns a source has."""

import base64
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from bifocal.data.kinds import KINDS
from bifocal.data.paths import Fence, is_remote
from bifocal.data.skips import Fault
from bifocal.data.text_files import OTHER_ENCODING

# Columns that a source may have for ours, in the order in which they are looked for: sentence-transformers' names for
# texts, those of LAION, img2dataset, imagefolder and the Hub's captioned pictures for images.
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
DPR_NEGATIVES = 7  # of the hundred that DPR's files hold of a row, where a source does not say how many it takes
_NUMBERED = re.compile(r"negative_(\d+)$")
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_SURROGATE = re.compile(r"[\ud800-\udfff]")
_BYTES = re.compile(r"[\udc80-\udcff]")  # what a reader has in place of bytes that it could not decode
_BASE64_IMAGES = ("/9j/", "iVBORw0KGgo", "R0lGOD", "UklGR", "Qk0", "SUkq", "TU0AK")  # JPEG, PNG, GIF, WebP, BMP, TIFF
_SHORTEST_BASE64 = 100  # characters; a shorter text is a path
_LONGEST_PATH = 4096


class Normaliser:
    """From a row of a source to a row of a kind.

    - image-text: `image` (bytes, or the path of a file within the fence), `caption` (a string or a list of them) and
      `image_id`, equal for rows with the same picture;
    - text-pair: `query`, `positive`; text-triplet: also `negatives`, one at least;
    - text-only: `text`; image-only: `image` and `image_id`;
    - image-label: `image`, `label`, a string; scored-pair: `first`, `second`, `score`, a number.

    Args:
        kind: of the rows to make.
        columns: theirs for each of ours, where they are not among `NAMES`; `json.FIELD` is a field of a sample's JSON.
        fence: of the pictures.
        negatives: how many each row has; rows with fewer are faults, more are cut. None takes what is there.
    """

    def __init__(
        self, kind: str, columns: Mapping[str, str] = {}, fence: Fence | None = None, negatives: int | None = None
    ) -> None:
        self.kind = kind
        self.columns = dict(columns)
        self.fence = fence or Fence(None)
        self.negatives = negatives

    def __call__(self, name: str, raw: Mapping[str, Any]) -> dict[str, Any]:
        """
        Args:
            name: of the row.

        Raises:
            Fault: what the row lacks, or what is wrong with it.
        """
        row: dict[str, Any] = {}
        for column in KINDS[self.kind]:
            if column == "image":
                row["image"], where = self._image(raw)
                known = self._find("image_id", raw, required=False)
                row["image_id"] = str(where or name if known is None else known)
            elif column in ("label", "score"):
                row[column] = self._plain(column, raw)
            else:
                row[column] = self._negatives(raw) if column == "negatives" else self.texts(column, raw)
        return row

    def column_of(self, column: str, names: Iterable[str]) -> str | None:
        """Which of a source's columns is ours."""
        names = list(names)
        return self.columns.get(column) or next((name for name in NAMES[column] if name in names), None)

    def _find(self, column: str, raw: Mapping[str, Any], required: bool = True) -> Any:
        given = self.columns.get(column)
        for name in (given,) if given else NAMES[column]:
            if name in raw:
                return raw[name]
            outer, dot, inner = name.partition(".")
            if dot and isinstance(raw.get(outer), Mapping) and inner in raw[outer]:
                return raw[outer][inner]
        if required:
            has = ", ".join(map(str, list(raw)[:12]))
            raise Fault(f"no {column}", f"there is no column '{given or column}' (there are {has})")
        return None

    @staticmethod
    def _fetched(address: str) -> bytes:
        """A picture that a streamed data set of the Hub names by an address."""
        import fsspec

        try:
            with fsspec.open(address, "rb") as file:
                return file.read()
        except Exception as error:  # each protocol has its own
            raise Fault("missing picture", str(error)[:300]) from error

    def texts(self, column: str, raw: Mapping[str, Any]) -> str | list[str]:
        """One column of texts.

        Raises:
            Fault: there is none, or none that can be used.
        """
        value = self._find(column, raw)
        if isinstance(value, list):
            if not value:
                raise Fault(f"no {column}", "an empty list")
            return [_text(column, one) for one in value]
        return _text(column, value)

    def _plain(self, column: str, raw: Mapping[str, Any]) -> Any:
        """A label as a string, or a score as a number."""
        value = self._find(column, raw)
        if column == "label":
            # Unlabelled splits of the Hub have -1.
            if isinstance(value, str | int) and value != -1 and str(value).strip():
                return str(value).strip()
            raise Fault("no label", f"{value!r:.100}")
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise Fault("no score", f"{value!r:.100} is no number") from None
        if not math.isfinite(number):
            raise Fault("no score", f"{number} is not finite")
        return number

    def _negatives(self, raw: Mapping[str, Any]) -> list[str]:
        numbered = sorted((int(m[1]), m[0]) for m in map(_NUMBERED.match, raw) if m)
        value: Any = self._find("negatives", raw, required=not numbered)
        values = list(value) if isinstance(value, list | tuple) else [] if value is None else [value]
        if "negatives" not in self.columns:
            values += [raw[name] for _, name in numbered if raw[name] is not None]
        found = [_text("negatives", one) for one in values]
        wanted = self.negatives
        if len(found) < (wanted or 1):
            raise Fault("too few negatives", f"{len(found)} of {wanted or 1}")
        return found[:wanted]

    def _image(self, raw: Mapping[str, Any]) -> tuple[Any, str | None]:
        """The picture, and what it is known by."""
        value = self._find("image", raw)
        if isinstance(value, Mapping):  # an undecoded `datasets.Image`
            value = value.get("bytes") if value.get("bytes") is not None else value.get("path")
        if isinstance(value, bytes | bytearray):
            if not value:
                raise Fault("no image", "0 bytes")
            return bytes(value), None
        if isinstance(value, str) and value.strip():
            content = _embedded(value)
            if content is not None:
                return content, None
            if len(value) > _LONGEST_PATH:
                raise Fault("no image", f"a text of {len(value):,} characters is no path: {value[:40]!r}...")
            if _CONTROL.search(value):
                raise Fault("control characters", f"in the path {value[:200]!r}")
            path = self.fence.resolve(value)
            return (self._fetched(path) if is_remote(path) else path), path
        if value is None or isinstance(value, str):
            raise Fault("no image", "the cell is empty")
        raise Fault("no image", f"it is neither bytes nor a path, but of type {type(value).__name__}")


def _embedded(value: str) -> bytes | None:
    """Return the image that a text holds in base64, as a data URI or bare, as some tables have it; None for a path."""
    content = value.partition(",")[2] if value[:5].lower() == "data:" else value
    if content is value and (len(value) < _SHORTEST_BASE64 or not value.startswith(_BASE64_IMAGES)):
        return None
    try:
        return base64.b64decode("".join(content.split()), validate=True)
    except ValueError as error:
        raise Fault("no image", f"{len(value):,} characters that are no base64 ({error})") from error


def has_column(column: str, names: Iterable[str]) -> bool:
    """Whether a source with columns of these names has one for ours."""
    names = list(names)
    numbered = column == "negatives" and any(map(_NUMBERED.match, names))
    return numbered or any(name.partition(".")[0] in names for name in NAMES[column])


def _text(column: str, value: Any) -> str:
    if not isinstance(value, str):
        raise Fault(f"no {column}", f"a {type(value).__name__} is no text")
    if not value.strip():
        raise Fault(f"no {column}", "an empty text")
    if _SURROGATE.search(value):
        remedy = f"; {OTHER_ENCODING}" if _BYTES.search(value) else ""
        raise Fault("not UTF-8", f"in {column}: {value[:100]!r}{remedy}")
    if _CONTROL.search(value):
        raise Fault("control characters", f"in {column}: {value[:100]!r}")
    return value.strip()


Layout = Callable[[Mapping[str, Any]], Mapping[str, Any]]


def sharegpt4v(raw: Mapping[str, Any]) -> dict[str, Any]:
    """ShareGPT4V's `image` and `conversations` (arXiv 2311.12793): what the model answered, without the image token."""
    turns = raw.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise Fault("no caption", "no conversations")
    said = [
        str(turn.get("value", "")) for turn in turns
        if isinstance(turn, Mapping) and turn.get("from") in ("gpt", "assistant")
    ]  # fmt: skip
    captions = [text for text in (re.sub(r"\s*<image>\s*", " ", one).strip() for one in said) if text]
    if not captions:
        raise Fault("no caption", "no answer in the conversations")
    return {"image": raw.get("image"), "caption": captions[0] if len(captions) == 1 else captions}


def dpr(raw: Mapping[str, Any], negatives: int | None = None) -> dict[str, Any]:
    """DPR's Natural Questions (arXiv 2004.04906): the first positive passage, hard negatives before others."""
    positives = raw.get("positive_ctxs") or []
    if not positives:
        raise Fault("no positive", "no positive_ctxs")
    others = [*(raw.get("hard_negative_ctxs") or []), *(raw.get("negative_ctxs") or [])]
    return {
        "query": raw.get("question"),
        "positive": passage(positives[0]),
        "negatives": [passage(one) for one in others[: negatives or DPR_NEGATIVES]],
    }


def passage(document: Mapping[str, Any]) -> str:
    """Title and text, as BEIR joins them."""
    return f"{document.get('title') or ''} {document.get('text') or ''}".strip()


def as_is(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    return raw


LAYOUTS: dict[str, Layout] = {"sharegpt4v": sharegpt4v, "dpr": dpr}


def layout_of(raw: Mapping[str, Any]) -> str | None:
    """The published layout that a row is in, by its columns."""
    if "conversations" in raw and "image" in raw:
        return "sharegpt4v"
    if "positive_ctxs" in raw:
        return "dpr"
    if {"gold_label", "sentence1", "sentence2"} <= set(raw) or {"premise", "hypothesis", "label"} <= set(raw):
        return "nli"
    return None
