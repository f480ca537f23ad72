"""Checks what `bifocal serve --space` is asked for. Imports nothing heavy, so that it is quick."""

from pathlib import Path

from bifocal.files import NotOursError, require_replaceable
from bifocal.hub.search.hits import SearchError
from bifocal.hub.search.index import SearchIndex

SPACE = "Space"  # kind of the folder in its list of files


def check_space(index: SearchIndex, out: Path, model: str) -> Path | None:
    """Check the arguments of `write_space`; return the folder of the index's model, None for a Hub id.

    Raises:
        SearchError, NotOursError: as `write_space`.
    """
    folder = Path(model).expanduser()
    is_id = not folder.exists() and model.count("/") == 1 and not model.startswith((".", "/", "~"))
    if not folder.exists() and not is_id:
        raise SearchError(f"The index's model is no longer at '{model}'. Pass --model with its local path.")
    for copied in (index.folder, *([] if is_id else [folder])):
        if out.resolve().is_relative_to(copied.resolve()):
            raise NotOursError(f"'{out}' lies in '{copied}', which is copied into the Space; choose another folder.")
    require_replaceable(out, SPACE)
    return None if is_id else folder
