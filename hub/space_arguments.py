"""Checks what `bifocal serve --space` is asked for. Imports nothing heavy, so that it is quick."""

from pathlib import Path

from bifocal.files import NotOursError, require_replaceable
from bifocal.hub.search.hits import SearchError
from bifocal.hub.search.index import SearchIndex

SPACE = "Space"  # kind of the folder in its list of files


def check_space(index: SearchIndex, out: Path, model: str, kind: str = SPACE) -> Path | None:
    """Check the arguments of `write_space`; return the folder of the index's model, None for a Hub id.

    Args:
        index: index to copy.
        out: folder to write.
        model: folder or Hub id of the index's model.
        kind: kind of the folder in its list of files.

    Raises:
        SearchError, NotOursError: as `write_space`.
    """
    folder = Path(model).expanduser()
    is_id = not folder.exists() and model.count("/") == 1 and not model.startswith((".", "/", "~"))
    if not folder.exists() and not is_id:
        raise SearchError(f"The index's model is no longer at '{model}'. Pass --model with its local path.")
    for copied in (index.folder, *([] if is_id else [folder])):
        if out.resolve().is_relative_to(copied.resolve()):
            raise NotOursError(f"'{out}' lies in '{copied}', which is copied into the {kind}; choose another folder.")
    require_replaceable(out, kind)
    return None if is_id else folder
