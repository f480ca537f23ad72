"""Filters that a source asks for; each filtered row is counted by its cause."""

import hashlib
import io
import re
from collections.abc import Mapping
from typing import Annotated, Any

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, field_validator

from bifocal.data.image_errors import image_row_error
from bifocal.data.skips import RowError
from bifocal.dtypes import DtypeChoice
from bifocal.errors import DataError

_SPACE = re.compile(r"\s+")
_TEXTS = ("caption", "query", "positive", "text")
DUPLICATE_IMAGE, DUPLICATE_TEXT = "duplicate image", "duplicate text"  # causes


class Consistency(BaseModel):
    """The consistency filter: keep a pair if its positive is among the nearest of its query (arXiv 2212.03533).

    Args:
        model: any model that embeds texts (sentence-transformers, Bifocal, CLIP, ...), by folder or Hub id.
        top_k: the positive must be among this many nearest texts.
        pool_size: number of consecutive rows whose positives are compared.
        dtype: dtype to embed in: "model", that of the model's weights; "auto", bfloat16 where the device multiplies
            in it, else as "model"; "float32", "bfloat16" or "float16".
    """

    model_config = ConfigDict(extra="forbid")
    model: str
    top_k: Annotated[int, Field(ge=1)] = 2
    pool_size: Annotated[int, Field(ge=2)] = 100_000
    dtype: DtypeChoice = "model"


class Cleaning(BaseModel):
    """Filters of a source; by default every row is kept.

    Args:
        deduplicate_images: remove rows whose image has the same bytes as an earlier one.
        deduplicate_texts: remove rows whose texts equal earlier ones, ignoring case and spaces.
        near_duplicate_images: remove rows whose image looks like that of an earlier row: hashes of 64 bits differ in at
            most this many, and colours hardly. 8 finds re-encoded and resized images.
        near_duplicate_texts: remove rows of which each text has at least this Jaccard similarity of character 5-grams
            to that of an earlier row, such as 0.8.
        exclude_rows_of: sources, such as evaluation sets, whose rows are removed: the same image or text, or a
            near-duplicate. Paths, or mappings of a source's keys.
        min_characters, max_characters: bounds for the length of each caption, query, positive and text.
        verify_images: decode every image when the data is loaded, so that broken ones are not first found in training.
        min_image_size: least length of an image's shorter side, in pixels.
        max_aspect_ratio: largest ratio of an image's longer side to its shorter side.
        languages: ISO 639-1 codes; texts that py3langid takes for another language are removed.
        include: regular expression that each text must contain.
        exclude: regular expressions that no text may contain.
        consistency: see `Consistency`; for text pairs and triplets.
    """

    model_config = ConfigDict(extra="forbid")
    deduplicate_images: bool = False
    deduplicate_texts: bool = False
    near_duplicate_images: Annotated[int, Field(ge=0, le=16)] | None = None
    near_duplicate_texts: Annotated[float, Field(ge=0.5, le=1)] | None = None
    exclude_rows_of: list[str | dict[str, Any]] = []
    min_characters: Annotated[int, Field(ge=1)] | None = None
    max_characters: Annotated[int, Field(ge=1)] | None = None
    verify_images: bool = False
    min_image_size: Annotated[int, Field(ge=1)] | None = None
    max_aspect_ratio: Annotated[float, Field(ge=1)] | None = None
    languages: list[str] = []
    include: str | None = None
    exclude: list[str] = []
    consistency: Consistency | None = None

    @field_validator("exclude_rows_of", mode="before")
    @classmethod
    def _as_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str | dict) else value

    @field_validator("include", "exclude")
    @classmethod
    def _patterns(cls, value: Any) -> Any:
        for pattern in [value] if isinstance(value, str) else value or []:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"'{pattern}' is not a regular expression ({error})") from error
        return value

    @property
    def needs_whole(self) -> bool:
        """Return whether a filter compares rows with one another, and so needs all of them."""
        return self.deduplicate_images or self.deduplicate_texts or self.compares_rows

    @property
    def compares_rows(self) -> bool:
        """Return whether a filter works only when all rows are loaded; exact duplicates are found while reading."""
        return self.compares_signatures or bool(self.exclude_rows_of) or self.consistency is not None

    def separate(self, exact: bool) -> "tuple[Cleaning, Cleaning]":
        """Return the filters that look at one row alone, and those that need only signatures of all rows.

        Args:
            exact: whether exact duplicates belong to the second ones.
        """
        names = {"near_duplicate_images", "near_duplicate_texts", "exclude_rows_of"}
        names |= {"deduplicate_images", "deduplicate_texts"} if exact else set()
        compared = self.model_dump(include=names)
        return self.model_copy(update=Cleaning().model_dump(include=names)), Cleaning().model_copy(update=compared)

    @property
    def compares_signatures(self) -> bool:
        """Return whether near-duplicates are removed."""
        return self.near_duplicate_images is not None or self.near_duplicate_texts is not None


class RowFilter:
    """Applies the filters of a `Cleaning` that look at one row, and exact duplicates, which take 16 bytes per row."""

    def __init__(self, cleaning: Cleaning) -> None:
        self.cleaning = cleaning
        self.seen: set[bytes] = set()
        self._include = re.compile(cleaning.include) if cleaning.include else None
        self._exclude = [re.compile(pattern) for pattern in cleaning.exclude]
        self._identify = _identifier(cleaning.languages) if cleaning.languages else None

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Return the row, perhaps with fewer captions.

        Raises:
            RowError: if the row is filtered.
        """
        kept = dict(row)
        for column in _TEXTS:
            if column in row:
                kept[column] = self._texts(column, row[column])
        if "image" in row:
            if self.cleaning.verify_images:
                require_readable(read_image_bytes(row["image"]))
            self._check_size(row["image"])
        if self.cleaning.deduplicate_images and "image" in row:
            self._require_new(DUPLICATE_IMAGE, read_image_bytes(row["image"]))
        if self.cleaning.deduplicate_texts:
            self._require_new(DUPLICATE_TEXT, comparable_texts(kept))
        return kept

    def _texts(self, column: str, value: Any) -> Any:
        if not isinstance(value, list):
            self._text(column, value)
            return value
        good, last = [], None
        for caption in value:  # an image keeps the captions that pass
            try:
                self._text(column, caption)
                good.append(caption)
            except RowError as row_error:
                last = row_error
        if not good and last is not None:
            raise last
        return good

    def _text(self, column: str, text: str) -> None:
        settings = self.cleaning
        if settings.min_characters is not None and len(text) < settings.min_characters:
            raise RowError(f"short {column}", text[:100], filtered=True)
        if settings.max_characters is not None and len(text) > settings.max_characters:
            raise RowError(f"long {column}", f"{len(text):,} characters", filtered=True)
        if self._include is not None and not self._include.search(text):
            raise RowError(f"{column} without the pattern", text[:100], filtered=True)
        for pattern in self._exclude:
            if pattern.search(text):
                raise RowError(f"{column} with a pattern", f"{pattern.pattern}: {text[:100]}", filtered=True)
        if self._identify is not None:
            language = self._identify(text)
            if language not in settings.languages:
                raise RowError(f"{column} in another language", f"{language}: {text[:100]}", filtered=True)

    def _check_size(self, value: Any) -> None:
        least, most = self.cleaning.min_image_size, self.cleaning.max_aspect_ratio
        if least is None and most is None:
            return
        width, height = image_size(value)
        if least is not None and min(width, height) < least:
            raise RowError("small image", f"{width} x {height}", filtered=True)
        if most is not None and max(width, height) > most * min(width, height):
            raise RowError("extreme ratio", f"{width} x {height}", filtered=True)

    def _require_new(self, cause: str, content: bytes) -> None:
        key = hashlib.blake2b(content, digest_size=16, person=cause.encode()[:16]).digest()
        if key in self.seen:
            raise RowError(cause, "", filtered=True)
        self.seen.add(key)


def comparable_text(text: Any) -> str:
    """Return a text in the form that is compared for duplicates: case and spaces do not count."""
    joined = "\n".join(text) if isinstance(text, list) else text
    return _SPACE.sub(" ", joined).strip().casefold()


def comparable_texts(row: Mapping[str, Any]) -> bytes:
    """Return the texts of a row in the form that is compared for duplicates."""
    texts = (comparable_text(row[column]) for column in _TEXTS if column in row)
    return "\0".join(texts).encode("utf-8", "surrogatepass")


def read_image_bytes(value: Any) -> bytes:
    """Return the bytes of an image's file.

    Raises:
        RowError: if the file cannot be read.
    """
    if isinstance(value, bytes):
        return value
    try:
        with open(value, "rb") as file:
            return file.read()
    except OSError as error:
        raise image_row_error(error) from error


def require_readable(data: bytes) -> None:
    """Require that bytes can be decoded as an image.

    Raises:
        RowError: if they are not an image, or a broken one.
    """
    from bifocal.modeling import load_image

    try:
        load_image(data)
    except Exception as error:
        raise image_row_error(error) from error


def image_size(value: Any) -> tuple[int, int]:
    """Return width and height of an image without decoding it.

    Raises:
        RowError: if it is not an image.
    """
    try:
        with Image.open(io.BytesIO(value) if isinstance(value, bytes) else value) as image:
            return image.size
    except Exception as error:
        raise image_row_error(error) from error


def _identifier(languages: list[str]) -> Any:
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError as error:
        raise DataError("A filter by language needs py3langid. Install it with `pip install py3langid`.") from error
    identifier = LanguageIdentifier.from_model_file(MODEL_FILE)
    unknown = [language for language in languages if language not in identifier.labels]
    if unknown:
        raise DataError(f"py3langid does not know the language '{unknown[0]}'. Use ISO 639-1 codes, such as en.")
    return lambda text: identifier.classify(text)[0]
