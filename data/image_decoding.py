"""Views of data sets whose images stay undecoded."""

import copy
from typing import Any


def disable_image_decoding(dataset: Any) -> Any:
    """Return a view of a data set whose images come as bytes or paths, in lists, too; nothing is copied.

    The workers decode them with one set of rules, so that a broken image costs its row and not the run.
    """
    from datasets import Dataset
    from datasets.fingerprint import update_fingerprint

    features = dataset.features
    if features is None or not any(_decodes(feature) for feature in features.values()):
        return dataset
    if not isinstance(dataset, Dataset):
        return dataset.decode(False)
    # `cast_column` copies every row where the images are in lists; the bytes below are the same either way.
    view = copy.deepcopy(dataset)
    for name, feature in features.items():
        view._info.features[name] = _undecoded(feature)
    view._fingerprint = update_fingerprint(dataset._fingerprint, disable_image_decoding, {})
    return view


def image_paths(dataset: Any, column: str) -> list[str | None] | None:
    """Return the paths of images that a data set does not hold as bytes; None for one that it holds."""
    import pyarrow as pa
    import pyarrow.compute as pc

    values = dataset.with_format("arrow").select_columns([column])[:][column]
    if not pa.types.is_struct(values.type):
        return values.to_pylist() if pa.types.is_string(values.type) else None
    held = pc.is_valid(pc.struct_field(values, "bytes"))
    return pc.if_else(held, None, pc.struct_field(values, "path")).to_pylist()


def _decodes(feature: Any) -> bool:
    from datasets import Image

    if isinstance(feature, Image):
        return feature.decode
    inner = feature.values() if isinstance(feature, dict) else [getattr(feature, "feature", None)]
    return any(part is not None and _decodes(part) for part in inner)


def _undecoded(feature: Any) -> Any:
    from datasets import Image

    if isinstance(feature, Image):
        return Image(mode=feature.mode, decode=False)
    if isinstance(feature, dict):
        return {name: _undecoded(inner) for name, inner in feature.items()}
    if getattr(feature, "feature", None) is not None:
        changed = copy.copy(feature)
        changed.feature = _undecoded(feature.feature)
        return changed
    return feature
