"""Where rows come from, as a recipe or a command names it."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from bifocal.data.filters import Cleaning
from bifocal.data.schema import Strict, set_override, validated


class Source(Strict):
    """Where rows come from.

    Args:
        path: files (JSONL, JSON, CSV, TSV, Parquet, Arrow, tar shards; the first four also as .gz) by path, glob, brace
            pattern or address (`hf://`, `https://`), one or a list; a folder of pictures with a `metadata.jsonl` or
            `metadata.csv`, of tar shards, or in BEIR's layout; a data set's id on the Hub; `corpus:NAME` for one of the
            corpora that `bifocal data list` prints; or "symbols", the one that needs no download.
        format: of the files where neither name nor content says it.
        name, split: configuration and split of a data set.
        header: names of the columns of a CSV or TSV file that has no line with them.
        delimiter: between the fields of a CSV or TSV file: one character, a comma or a tab if None.
        quoting: of a CSV or TSV file, as `csv` and pandas name it. "none": a quote is a character like others.
            "minimal" or "all": quotes enclose fields. If None, TSV files are read as with "none", CSV files as with
            "minimal", but where a quote encloses what looks like rows, these are read, and the row with it is bad.
        encoding: of a CSV, TSV, JSON or JSONL file, a codec of Python such as "cp1252" or "utf-16"; UTF-8 if None.
        columns: theirs for each of ours, such as `caption: text`; `json.FIELD` is a field of a shard's JSON.
        images: the folder that relative paths of pictures begin in, or one for each first part of a path; no picture
            outside is read. The folder of the file that names them when None.
        negatives: how many of a row's hard negatives to take, the first ones; rows with fewer are left out. All of them
            when None (of DPR's files the first seven), of which a task uses as many as nearly all rows have.
        streaming: read in order, without a copy on disk.
        limit: take only the first so many rows.
        clean: filters, see `Cleaning`.
        max_bad: the share of rows that may be bad; they are left out and named in the run's skipped.jsonl.
    """

    path: str | list[str]
    format: (
        Literal[
            "webdataset",
            "jsonl",
            "json",
            "csv",
            "tsv",
            "parquet",
            "arrow",
            "sharegpt4v",
            "dpr",
            "nli",
            "msmarco",
            "hub",
        ]
        | None
    ) = None
    name: str | None = None
    split: str = "train"
    header: list[str] | None = None
    delimiter: str | None = None
    quoting: Literal["minimal", "all", "none"] | None = None
    encoding: str | None = None
    columns: dict[str, str] = {}
    images: str | dict[str, str] | None = None
    negatives: Annotated[int, Field(ge=1)] | None = None
    streaming: bool = False
    limit: Annotated[int, Field(ge=1)] | None = None
    clean: Cleaning | None = None
    max_bad: Annotated[float, Field(ge=0, le=1)] = 0.01

    @field_validator("delimiter")
    @classmethod
    def _one_character(cls, value: str | None) -> str | None:
        value = {"\\t": "\t", "tab": "\t"}.get(value or "", value)
        if value is not None and (len(value) != 1 or value in '"\r\n'):
            raise ValueError(f"the delimiter must be one character, such as ';' or '\\t', not {value!r}")
        return value

    @field_validator("quoting", mode="before")
    @classmethod
    def _as_csv_has_it(cls, value: Any) -> Any:
        """`csv.QUOTE_NONE`, its number and its name mean the same."""
        if isinstance(value, int):
            return {0: "minimal", 1: "all", 3: "none"}.get(value, value)
        return value.lower().removeprefix("csv.").removeprefix("quote_") if isinstance(value, str) else value

    @field_validator("encoding")
    @classmethod
    def _known_to_python(cls, value: str | None) -> str | None:
        try:
            "".encode(value or "utf-8")  # also refuses codecs that are no encodings of text, such as base64
        except LookupError:
            raise ValueError(f"'{value}' is no encoding that Python knows, such as cp1252 or utf-16") from None
        return value

    @property
    def title(self) -> str:
        """The path, or the first of several, for messages."""
        return self.path if isinstance(self.path, str) else f"{self.path[0]} and {len(self.path) - 1} more"


def source_of(path: str, overrides: list[str] | None = None) -> Source:
    """A source from a path and "key=value" with the keys of `Source`, dots between them, as on the command line.

    Raises:
        RecipeError: an unknown key or a wrong value.
    """
    values: dict[str, Any] = {"path": path}
    for override in overrides or []:
        set_override(values, override)
    return validated(Source, values, overrides or [])
