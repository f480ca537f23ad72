"""Mine hard negatives for a source with a model by its name, into a Parquet file."""

from pathlib import Path
from typing import Any

from bifocal.data.vector_cache import require_cache_folder
from bifocal.errors import ModelError, RecipeError, require_local_model
from bifocal.files import require_overwritable
from bifocal.training.mining_settings import DIRECTIONS, MINED, MiningError, MiningSettings


def mine_source(
    source: str, out: Path, model: str, direction: str, columns: list[str], cache: Path | None,
    settings: dict[str, Any], dtype: str | None = None,
) -> str:  # fmt: skip
    """Mine hard negatives for a source and write them as Parquet; return a line for the user.

    Args:
        columns: the source's columns as `theirs=ours`, such as `question=query`.
        settings: fields of `MiningSettings`.
        dtype: dtype of the model, one of `DTYPE_CHOICES`; "model", that of its weights, when None.

    Raises:
        MiningError, ModelError, NotOursError, DataError: if the settings, the data or the model cannot be used.
    """
    from bifocal.data.loading import load_source
    from bifocal.data.schema import validated
    from bifocal.data.source import Source

    require_overwritable(out, MINED)  # now, and not after hours of mining
    cache = cache or (out.with_suffix(".cache") if direction in DIRECTIONS[1:] else None)
    if cache is not None:
        require_cache_folder(cache)
    renamed = {}
    for column in columns:
        theirs, equals, ours = column.partition("=")
        if not equals:
            raise RecipeError(f"'{column}' names no column. Write it as in question=query, yours first.")
        if theirs in renamed:
            raise RecipeError(f"'{theirs}' is mapped twice. A column can have one new name; copy it to use it as two.")
        renamed[theirs] = ours
    if direction not in DIRECTIONS:
        raise MiningError(f"direction must be one of {', '.join(DIRECTIONS)}, but it is '{direction}'.")
    if out.is_dir():
        raise MiningError(f"'{out}' is a folder. Give the Parquet file to write.")
    chosen = MiningSettings(**settings)
    require_local_model(model)
    kind = "text-pair" if direction == "text-to-text" else "image-text"
    data = load_source(validated(Source, {"path": source, "column_mapping": renamed}, []), kind)
    # Not before all of this is checked: it imports torch.
    from bifocal.training import mining

    if direction == "text-to-text":
        mined = mining.mine_texts(data, _load_model(model, dtype), chosen, cache)
    else:
        assert cache is not None
        loaded = _load_model(model, dtype)
        if not hasattr(loaded, "encode_image"):
            raise ModelError(
                f"'{model}' is no dual encoder, which mining across images and texts needs. Give a Bifocal, CLIP or "
                "SigLIP model."
            )
        mined = mining.mine_across(data, loaded, direction, cache, chosen)
    mining.write_parquet(mined, out)
    return f"{len(mined)} of {len(data)} rows have {chosen.num_negatives} negatives; they are in {out}."


def _load_model(name: str, dtype: str | None) -> Any:
    from bifocal.embedding.models import load_model
    from bifocal.progress import no_progress_bars

    with no_progress_bars():
        return load_model(name, dtype).model
