"""`index.json`: the settings of an index besides its table."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bifocal.hub.search.atomic import replace_file
from bifocal.hub.search.hits import SearchError

FORMAT = 3
SETTINGS = "index.json"
PRECISIONS = ("float32", "int8")
DTYPES = ("model", "float32", "bfloat16", "float16")  # that vectors are computed in; "model" is that of the weights
_TYPES = {"model": str, "weights": str, "dimensions": int, "parts": int, "sources": list, "variants": list}


class Variant(NamedTuple):
    """A form of an index's vectors that can be searched.

    Args:
        dim: number of leading dimensions.
        precision: "float32" or "int8".
        approximate: whether a query is compared with a part of the vectors only, where there are many.
    """

    dim: int
    precision: str
    approximate: bool = False

    def __str__(self) -> str:
        return f"{self.dim} {self.precision}" + self.approximate * " approximate"

    @property
    def file_name(self) -> str:
        """What the names of its FAISS indexes begin with."""
        return f"{self.dim}-{self.precision}" + self.approximate * "-approximate"

    def to_json(self) -> list[Any]:
        """Return the variant as the settings store it."""
        return [self.dim, self.precision, *(["approximate"] if self.approximate else [])]

    @classmethod
    def from_json(cls, values: list[Any]) -> "Variant":
        """Return the variant that `to_json` stored."""
        return cls(values[0], values[1], len(values) == 3)


class IndexSettings:
    """The settings of an index, and what they ask of a model, an option or a query.

    Args:
        folder: folder of the index.

    Raises:
        SearchError: see `read_settings`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        settings = read_settings(self.folder)
        self.model: str = settings["model"]
        self.weights: str = settings["weights"]
        self.dimensions: int = settings["dimensions"]
        self.variants: list[Variant] = [Variant.from_json(values) for values in settings["variants"]]
        self.sources: list[dict[str, Any]] = settings["sources"]
        self.parts: int = settings["parts"]
        self.prompts: dict[str, str] = settings["prompts"]
        self.dtype: str = settings["dtype"]
        self.fast_decoding: bool = settings["fast_decoding"]

    @staticmethod
    def check_dims(dims: Sequence[int], dimensions: int) -> None:
        """Check numbers of leading dimensions.

        Args:
            dimensions: length of the model's vectors.

        Raises:
            SearchError: if one is out of range.
        """
        for dim in dims:
            if not 1 <= dim <= dimensions:
                raise SearchError(
                    f"The model has {dimensions} dimensions; choose --dim from 1 to {dimensions}, not {dim}."
                )

    @staticmethod
    def check(folder: Path, precisions: Sequence[str]) -> None:
        """Check what `create` can know without a model.

        Raises:
            SearchError: if the folder holds something else than an index, or a precision is unknown.
        """
        for precision in precisions:
            if precision not in PRECISIONS:
                raise SearchError(f"'{precision}' is not a precision. Choose one of {', '.join(PRECISIONS)}.")
        if (folder / SETTINGS).exists() or not folder.exists():
            return
        if not folder.is_dir() or any(folder.iterdir()):
            raise SearchError(f"'{folder}' holds other files and no index. Choose another folder.")

    def require_same_weights(self, weights: str, model: str) -> None:
        """Check that the index was made with these weights.

        Raises:
            SearchError: if the index was made with other weights.
        """
        if weights != self.weights:
            raise SearchError(
                f"The index '{self.folder}' was made with '{self.model}' ({self.weights}), but '{model}' has other "
                f"weights ({weights}), whose vectors cannot be compared. Index again into another folder."
            )

    def require_decoding(self, fast: bool | None) -> None:
        """Check that the images of the index were decoded in this way; None stands for any.

        Raises:
            SearchError: if they were decoded in the other way.
        """
        if fast not in (None, self.fast_decoding):
            made, option = ("fast", "--no-fast-decoding") if self.fast_decoding else ("exact", "--fast-decoding")
            raise SearchError(
                f"The index '{self.folder}' was made with {made} decoding of images, and vectors of both kinds are not "
                f"comparable. Omit {option}, or index into another folder."
            )

    def require_same_dtype(self, dtype: str) -> None:
        """Check that the index was made in this dtype.

        Raises:
            SearchError: if the index was made in another dtype.
        """
        if dtype != self.dtype:
            own, other = ("the model's dtype" if name == "model" else name for name in (self.dtype, dtype))
            raise SearchError(
                f"The index '{self.folder}' was made in {own}, not in {other}. Use dtype {self.dtype}, or index into "
                "another folder."
            )

    def choose_variant(
        self, dim: int | None = None, precision: str | None = None, approximate: bool = False
    ) -> Variant:
        """Return the variant to search by.

        Args:
            dim, precision: if both are None, the most exact variant is chosen, an exhaustive one if there is one.
            approximate: choose among approximate variants only.

        Raises:
            SearchError: if the index has no such variant.
        """
        if dim is not None or precision is not None:
            return self.require_variant(self.dimensions if dim is None else dim, precision or "float32", approximate)
        choices = [variant for variant in self.variants if variant.approximate or not approximate]
        if not choices:
            raise SearchError(f"'{self.folder}' has no approximate form. Add one with bifocal index --approximate.")
        return max(choices, key=lambda one: (not one.approximate, one.dim, one.precision == "float32"))

    def require_variant(self, dim: int, precision: str, approximate: bool = False) -> Variant:
        """Return a variant of the index.

        Raises:
            SearchError: if the index lacks it.
        """
        variant = Variant(dim, precision, approximate)
        if variant not in self.variants:
            known = ", ".join(map(str, self.variants))
            form = f"{dim} dimensions in {precision}" + approximate * ", approximately"
            raise SearchError(f"'{self.folder}' cannot be searched by {form}, only by {known}.")
        return variant

    def options(self, identity: dict[str, Any]) -> dict[str, Any]:
        """Return the options of the last run over a source; none if the source is new."""
        return next((source["options"] for source in self.sources if source["identity"] == identity), {})

    def missing_sources(self) -> list[str]:
        """Return the local paths that were indexed and do not exist any more."""
        paths = [str(path) for source in self.sources for path in source["identity"].get("paths", ())]
        local = [path for path in paths if os.path.isabs(path) and not any(sign in path for sign in "*?[{")]
        return [path for path in dict.fromkeys(local) if not os.path.exists(path)]

    def _save(self) -> None:
        """Write the settings, together with what other processes have added to them. The caller holds the lock."""
        saved = read_settings(self.folder)
        self.sources = saved["sources"] + self.sources[len(saved["sources"]) :]
        self.parts = max(self.parts, saved["parts"])
        variants = [Variant.from_json(values) for values in saved["variants"]]
        self.variants = variants + [variant for variant in self.variants if variant not in variants]
        self._write_settings()

    def _write_settings(self) -> None:
        settings = dict(
            format=FORMAT, model=self.model, weights=self.weights, dimensions=self.dimensions, prompts=self.prompts,
            dtype=self.dtype, variants=[variant.to_json() for variant in self.variants], parts=self.parts,
            sources=self.sources, fast_decoding=self.fast_decoding,
        )  # fmt: skip
        write_settings(self.folder, settings)


def read_settings(folder: Path) -> dict[str, Any]:
    """Return the settings of an index.

    Raises:
        SearchError: if there is no index, or one that is damaged or of another version.
    """
    path = folder / SETTINGS
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise SearchError(f"'{folder}' is not an index. Make one with bifocal index.") from None
    except OSError as error:
        raise SearchError(f"'{path}' cannot be read ({error.strerror}). Change that and try again.") from error
    except (ValueError, RecursionError):
        settings = None
    if not isinstance(settings, dict) or "format" not in settings:
        raise SearchError(f"'{path}' is damaged. Index the sources again into another folder.")
    if settings["format"] != FORMAT:
        raise SearchError(f"'{folder}' was made by another version of Bifocal. Index again into another folder.")
    wrong = [name for name, kind in _TYPES.items() if not isinstance(settings.get(name), kind)]
    if not wrong and not (settings["variants"] and all(map(_is_variant, settings["variants"]))):
        wrong = ["variants"]
    if not wrong and not all(map(_is_source, settings["sources"])):
        wrong = ["sources"]
    settings.setdefault("prompts", {})  # of an index that was made before models had some
    if not wrong and not _are_prompts(settings["prompts"]):
        wrong = ["prompts"]
    settings.setdefault("dtype", "model")  # of an index that was made before there was a choice
    if not wrong and settings["dtype"] not in DTYPES:
        wrong = ["dtype"]
    settings.setdefault("fast_decoding", False)  # of an index that was made before there was another decoding
    if not wrong and not isinstance(settings["fast_decoding"], bool):
        wrong = ["fast_decoding"]
    if wrong:
        raise SearchError(f"'{path}' is damaged ({wrong[0]}). Index the sources again into another folder.")
    return settings


def _is_variant(variant: Any) -> bool:
    return (
        isinstance(variant, list)
        and len(variant) >= 2
        and variant[1] in PRECISIONS
        and (variant[2:] in ([], ["approximate"]))
    )


def _are_prompts(prompts: Any) -> bool:
    return isinstance(prompts, dict) and all(isinstance(text, str) for text in prompts.values())


def _is_source(source: Any) -> bool:
    return isinstance(source, dict) and all(isinstance(source.get(name), dict) for name in ("identity", "options"))


def write_settings(folder: Path, settings: dict[str, Any]) -> None:
    with replace_file(folder / SETTINGS) as temporary:
        temporary.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
