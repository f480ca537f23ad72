"""Filters that leave rows out because one asks for it; each row that goes is counted by its cause."""

import hashlib
import io
import re
from collections.abc import Mapping
from typing import Annotated, Any

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, field_validator

from bifocal.data.images import fault_of
from bifocal.data.skips import Fault
from bifocal.errors import DataError
from bifocal.modeling import load_image

_SPACE = re.compile(r"\s+")
_TEXTS = ("caption", "query", "positive", "text")


class Consistency(BaseModel):
    """Keep a pair if its positive is among the nearest of its query (arXiv 2212.03533, section 3).

    Args:
        model: of sentence-transformers, a folder or Hub id.
        nearest: among so many.
        pool: in so many rows that follow one another.
    """

    model_config = ConfigDict(extra="forbid")
    model: str
    nearest: Annotated[int, Field(ge=1)] = 2
    pool: Annotated[int, Field(ge=2)] = 100_000


class Cleaning(BaseModel):
    """What to leave out; nothing, if nothing is set.

    Args:
        duplicate_images: rows whose picture's bytes came before.
        duplicate_texts: rows whose texts came before, case and spaces apart.
        min_characters, max_characters: bounds of each caption, query, positive and text; at least 2 leaves out those of
            one character.
        readable: decode every picture now; one that cannot be is bad, and not found out in training.
        min_side: of a picture, in pixels.
        max_ratio: of a picture's longer side to its shorter.
        languages: ISO 639-1 codes; what py3langid takes for another language goes.
        keep: a pattern that each text must contain.
        drop: patterns that no text may contain.
        consistency: see `Consistency`; for text pairs and triplets.
    """

    model_config = ConfigDict(extra="forbid")
    duplicate_images: bool = False
    duplicate_texts: bool = False
    min_characters: Annotated[int, Field(ge=1)] | None = None
    max_characters: Annotated[int, Field(ge=1)] | None = None
    readable: bool = False
    min_side: Annotated[int, Field(ge=1)] | None = None
    max_ratio: Annotated[float, Field(ge=1)] | None = None
    languages: list[str] = []
    keep: str | None = None
    drop: list[str] = []
    consistency: Consistency | None = None

    @field_validator("keep", "drop")
    @classmethod
    def _patterns(cls, value: Any) -> Any:
        for pattern in [value] if isinstance(value, str) else value or []:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"'{pattern}' is no regular expression ({error})") from error
        return value

    @property
    def needs_whole(self) -> bool:
        """Whether a filter compares rows with one another, and so cannot work on a stream in parts."""
        return self.duplicate_images or self.duplicate_texts or self.consistency is not None


class RowFilter:
    """Applies all of a `Cleaning` but its consistency, row by row. For duplicates it remembers 16 bytes a row."""

    def __init__(self, cleaning: Cleaning) -> None:
        self.cleaning = cleaning
        self.seen: set[bytes] = set()
        self._keep = re.compile(cleaning.keep) if cleaning.keep else None
        self._drop = [re.compile(pattern) for pattern in cleaning.drop]
        self._identify = _identifier(cleaning.languages) if cleaning.languages else None

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The row, perhaps with fewer captions.

        Raises:
            Fault: the row goes.
        """
        kept = dict(row)
        for column in _TEXTS:
            if column in row:
                kept[column] = self._texts(column, row[column])
        if "image" in row:
            if self.cleaning.readable:
                require_readable(content(row["image"]))
            self._picture(row["image"])
        if self.cleaning.duplicate_images and "image" in row:
            self._once("duplicate image", content(row["image"]))
        if self.cleaning.duplicate_texts:
            self._once("duplicate text", "\0".join(same(kept[column]) for column in _TEXTS if column in kept).encode())
        return kept

    def _texts(self, column: str, value: Any) -> Any:
        if not isinstance(value, list):
            self._text(column, value)
            return value
        good, last = [], None
        for one in value:  # a picture keeps those of its captions that pass
            try:
                self._text(column, one)
                good.append(one)
            except Fault as fault:
                last = fault
        if not good and last is not None:
            raise last
        return good

    def _text(self, column: str, text: str) -> None:
        settings = self.cleaning
        if settings.min_characters is not None and len(text) < settings.min_characters:
            raise Fault(f"short {column}", text[:100], dropped=True)
        if settings.max_characters is not None and len(text) > settings.max_characters:
            raise Fault(f"long {column}", f"{len(text):,} characters", dropped=True)
        if self._keep is not None and not self._keep.search(text):
            raise Fault(f"{column} without the pattern", text[:100], dropped=True)
        for pattern in self._drop:
            if pattern.search(text):
                raise Fault(f"{column} with a pattern", f"{pattern.pattern}: {text[:100]}", dropped=True)
        if self._identify is not None:
            language = self._identify(text)
            if language not in settings.languages:
                raise Fault(f"{column} in another language", f"{language}: {text[:100]}", dropped=True)

    def _picture(self, value: Any) -> None:
        least, most = self.cleaning.min_side, self.cleaning.max_ratio
        if least is None and most is None:
            return
        width, height = size_of(value)
        if least is not None and min(width, height) < least:
            raise Fault("small picture", f"{width} x {height}", dropped=True)
        if most is not None and max(width, height) > most * min(width, height):
            raise Fault("extreme ratio", f"{width} x {height}", dropped=True)

    def _once(self, cause: str, content: bytes) -> None:
        key = hashlib.blake2b(content, digest_size=16, person=cause.encode()[:16]).digest()
        if key in self.seen:
            raise Fault(cause, "", dropped=True)
        self.seen.add(key)


def same(text: Any) -> str:
    """A text that others are equal to if they differ in case and spaces only."""
    joined = "\n".join(text) if isinstance(text, list) else text
    return _SPACE.sub(" ", joined).strip().casefold()


def content(value: Any) -> bytes:
    """The bytes of a picture's file.

    Raises:
        Fault: the file cannot be read.
    """
    if isinstance(value, bytes):
        return value
    try:
        with open(value, "rb") as file:
            return file.read()
    except OSError as error:
        raise fault_of(error) from error


def require_readable(data: bytes) -> None:
    """
    Raises:
        Fault: these bytes are no picture, or a broken one.
    """
    try:
        load_image(data)
    except Exception as error:
        raise fault_of(error) from error


def size_of(value: Any) -> tuple[int, int]:
    """Width and height of a picture that is not decoded.

    Raises:
        Fault: it is none.
    """
    try:
        with Image.open(io.BytesIO(value) if isinstance(value, bytes) else value) as image:
            return image.size
    except Exception as error:
        raise fault_of(error) from error


def _identifier(languages: list[str]) -> Any:
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError as error:
        raise DataError("A filter by language needs py3langid; pip install py3langid.") from error
    identifier = LanguageIdentifier.from_model_file(MODEL_FILE)
    unknown = [language for language in languages if language not in identifier.labels]
    if unknown:
        raise DataError(f"py3langid knows no language '{unknown[0]}'; give ISO 639-1 codes, such as en.")
    return lambda text: identifier.classify(text)[0]
