"""The configuration of a source: where rows come from and how they are read."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from bifocal.data.filters import Cleaning
from bifocal.data.kinds import KINDS
from bifocal.data.schema import Strict, require_distinct_columns, set_override, validated


class Source(Strict):
    """Where rows come from and how they are read.

    Args:
        path: files (JSONL, JSON, CSV, TSV, Parquet, Arrow, tar shards; the first four also as .gz) by path, glob, brace
            pattern or address (`hf://`, `https://`), one or a list; a folder of images with a `metadata.jsonl` or
            `metadata.csv`, of tar shards, or in BEIR's layout; a data set's id on the Hub; `corpus:NAME` for one of the
            corpora that `bifocal data list` prints; or "symbols", which needs no download.
        format: format of the files, if neither their name nor their content shows it.
        name, split: configuration and split of a data set, as in `datasets.load_dataset`.
        column_names: names of the columns of a CSV or TSV file without a header line.
        delimiter: the character between the fields of a CSV or TSV file; None means a comma or a tab.
        quoting: quoting of a CSV or TSV file, named as in `csv` and pandas. "none": a quote is an ordinary character.
            "minimal" or "all": quotes enclose fields. None reads TSV files like "none" and CSV files like "minimal",
            but where a quote encloses what looks like rows, each of these lines is a bad row.
        encoding: encoding of a CSV, TSV, JSON or JSONL file, a Python codec such as "cp1252"; None means UTF-8.
        column_mapping: new name for each column of the source, in the direction of `datasets.Dataset.rename_columns`,
            such as `title: caption`. `json.FIELD` is a field of the JSON in a tar shard, and `COLUMN.FIELD` one of a
            struct. A struct that is mapped to a column of texts, such as names by language, is a list of its texts.
        image_root: folder that relative image paths start from, or one folder for each first part of a path. Images
            outside it are not read. None means the folder of the file that names the images.
        num_negatives: hard negatives per row, the first ones; rows with fewer are skipped. None takes all of them (of
            DPR's files the first seven), and a task then uses as many as nearly all rows have.
        streaming: read the rows in order, without a copy on disk.
        limit: maximum number of rows.
        clean: filters, see `Cleaning`.
        max_bad_fraction: fraction of rows that may be bad. Bad rows are skipped and listed in skipped.jsonl; a run
            with more of them stops.
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
    column_names: list[str] | None = None
    delimiter: str | None = None
    quoting: Literal["minimal", "all", "none"] | None = None
    encoding: str | None = None
    column_mapping: dict[str, str] = {}
    image_root: str | dict[str, str] | None = None
    num_negatives: Annotated[int, Field(ge=1)] | None = None
    streaming: bool = False
    limit: Annotated[int, Field(ge=1)] | None = None
    clean: Cleaning | None = None
    max_bad_fraction: Annotated[float, Field(ge=0, le=1)] = 0.01

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
        """Return the name of a quoting; `csv.QUOTE_NONE`, its number and its name mean the same."""
        if isinstance(value, int):
            return {0: "minimal", 1: "all", 3: "none"}.get(value, value)
        return value.lower().removeprefix("csv.").removeprefix("quote_") if isinstance(value, str) else value

    @field_validator("encoding")
    @classmethod
    def _known_to_python(cls, value: str | None) -> str | None:
        try:
            "".encode(value or "utf-8")  # also refuses codecs that are not text encodings, such as base64
        except LookupError:
            raise ValueError(
                f"'{value}' is not an encoding that Python knows; use one such as cp1252 or utf-16"
            ) from None
        return value

    @field_validator("column_mapping", mode="before")
    @classmethod
    def _flatten(cls, value: Any) -> Any:
        """Return the mapping with dotted keys: `json: {alt: caption}` means `json.alt: caption`."""
        return dict(_dotted(value)) if isinstance(value, dict) else value

    @field_validator("column_mapping")
    @classmethod
    def _require_known_columns(cls, value: dict[str, str]) -> dict[str, str]:
        known = sorted({"image_id", *(column for columns in KINDS.values() for column in columns)})
        for name in value.values():
            if name not in known:
                raise ValueError(
                    f"'{name}' is not a column that Bifocal reads ({', '.join(known)}); write SOURCE_COLUMN: COLUMN, "
                    "such as title: caption"
                )
            if list(value.values()).count(name) > 1:
                both = [key for key, renamed in value.items() if renamed == name]
                raise ValueError(f"columns '{both[0]}' and '{both[1]}' are both mapped to '{name}'; keep one of them")
        return value

    @property
    def mapped_columns(self) -> dict[str, str]:
        """Return the source's column for each of Bifocal's columns that `column_mapping` names."""
        return {name: column for column, name in self.column_mapping.items()}

    @property
    def title(self) -> str:
        """Return the path, or the first of several, for messages."""
        return self.path if isinstance(self.path, str) else f"{self.path[0]} and {len(self.path) - 1} more"


def parse_source(path: str, overrides: list[str] | None = None) -> Source:
    """Return a source from a path and `key=value` overrides, as on the command line.

    Args:
        overrides: keys of `Source`, nested ones with dots, such as `clean.min_characters=3`.

    Raises:
        RecipeError: if a key is unknown or a value is wrong.
    """
    require_distinct_columns(overrides or [])
    values: dict[str, Any] = {"path": path}
    for override in overrides or []:
        set_override(values, override)
    return validated(Source, values, overrides or [])


def _dotted(mapping: dict[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in mapping.items():
        if isinstance(value, dict):
            yield from _dotted(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
