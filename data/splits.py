"""The independent files of a source, as sources of their own, for tasks that run side by side."""

import os

from bifocal.data.loading import named_source
from bifocal.data.locate import SourceSplit, locate
from bifocal.data.source import Source


def split_source(source: Source, kind: str) -> list[Source]:
    """Return the files of a source as sources, in the order in which `iter_rows` reads them.

    The rows of all splits are those of the source, with the same names. The source itself is the only split if it is
    the name of one file, a folder that is read as a whole (images, BEIR), or loaded by `datasets`, and if its rows
    depend on one another (`limit`, duplicates, consistency).

    Args:
        kind: kind of the rows that will be read from the splits.

    Raises:
        DataError: if there is nothing at the path, or its format is unknown.
    """
    source = named_source(source)
    if source.limit is not None or (source.clean is not None and source.clean.needs_whole):
        return [source]
    files = None if source.path == "symbols" else locate(source, kind)
    if files is None or (len(files.paths) == 1 and (source.path == files.paths[0] or _is_folder(source))):
        return [source]
    return list(SourceSplit.all_of(source, files))


def _is_folder(source: Source) -> bool:
    return isinstance(source.path, str) and os.path.isdir(os.path.expanduser(source.path))
