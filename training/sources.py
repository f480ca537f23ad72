"""From the source a recipe names to a data set with the columns of its task."""

from pathlib import Path
from typing import Any

from bifocal.training.recipe import BUILDERS, RecipeError, Source


def load_source(source: Source, columns: tuple[str, ...], seed: int = 0) -> Any:
    """
    Args:
        source: of a recipe.
        columns: those its task needs.
        seed: of the data sets that are made, not read.

    Returns:
        A `datasets.Dataset`, or with `streaming` an `IterableDataset`; pictures stay undecoded.

    Raises:
        RecipeError: nothing at the path, or no such column.
    """
    return with_columns(_load(source, seed), source, columns)


def with_columns(found: Any, source: Source, columns: tuple[str, ...]) -> Any:
    """What was found at a source, its first `limit` rows, with our names of the columns a task needs."""
    if source.limit is not None:
        found = found.take(source.limit)
    names = found.column_names
    for ours, theirs in source.columns.items():
        if names is not None and theirs not in names:
            raise RecipeError(
                f"'{source.path}' has no column '{theirs}' (it has {', '.join(names)}); mend columns.{ours}."
            )
    if names is not None:
        kept = {source.columns.get(ours, ours): ours for ours in (*columns, "image_id")}
        missing = [theirs for theirs, ours in kept.items() if theirs not in names and ours != "image_id"]
        if missing:
            raise RecipeError(
                f"'{source.path}' has no column '{missing[0]}' (it has {', '.join(names)}); name the right one under "
                f"columns, such as {kept[missing[0]]}: {names[0]}."
            )
        found = found.select_columns([theirs for theirs in kept if theirs in names])
    found = found.rename_columns({theirs: ours for ours, theirs in source.columns.items() if theirs != ours})
    return _undecoded(found)


def _load(source: Source, seed: int) -> Any:
    from datasets import load_dataset

    if source.path == "symbols":
        from bifocal.training.data.symbols import SymbolsConfig, build_symbols

        size = int(source.name) if source.name else 32
        return build_symbols(SymbolsConfig(image_size=size, seed=seed))[source.split]
    path = Path(source.path)
    options: dict[str, Any] = dict(split=source.split, streaming=source.streaming)
    if path.is_dir():
        metadata = [name for name in ("metadata.jsonl", "metadata.csv", "metadata.parquet") if (path / name).exists()]
        if metadata:
            return load_dataset("imagefolder", data_dir=str(path), **options)
        return load_dataset(str(path), source.name, **options)
    if path.suffix in BUILDERS:
        if not path.exists():
            raise RecipeError(f"There is no file '{path}'; check the path.")
        extra = {"delimiter": "\t"} if path.suffix == ".tsv" else {}
        try:
            return load_dataset(BUILDERS[path.suffix], data_files=str(path), **options, **extra)
        except Exception as error:
            raise RecipeError(f"'{path}' cannot be read ({_innermost(error)}); mend the file.") from error
    if path.is_absolute() or source.path.startswith((".", "~")) or source.path.count("/") > 1:
        raise RecipeError(f"There is nothing at '{path}'; check the path.")
    try:
        return load_dataset(source.path, source.name, **options)
    except Exception as error:
        raise RecipeError(
            f"'{source.path}' is no file or folder here, and could not be loaded from the Hub ({_innermost(error)})."
        ) from error


def _innermost(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _undecoded(dataset: Any) -> Any:
    """Pictures as bytes or paths: they are decoded in the collator, by the workers, with one set of rules."""
    from datasets import Image, List

    for name, feature in (dataset.features or {}).items():
        if isinstance(feature, Image):
            dataset = dataset.cast_column(name, Image(decode=False))
        elif isinstance(feature, List) and isinstance(feature.feature, Image):
            dataset = dataset.cast_column(name, List(Image(decode=False)))
    return dataset
