"""The independent files of a source, as sources of their own, for tasks that run side by side."""

from bifocal.data.loading import named_source
from bifocal.data.locate import SourceSplit, locate
from bifocal.data.source import Source


def split_source(source: Source, kind: str) -> list[Source]:
    """Return the files of a source as sources, in the order in which `iter_rows` reads them.

    The rows of all splits are those of the source, with the same names. There is only one split, the source itself, if
    it is one file, a folder that is read as a whole (images, BEIR), or loaded by `datasets`, and if its rows depend on
    one another (`limit`, duplicates, consistency).

    Args:
        kind: kind of the rows that will be read from the splits.

    Raises:
        DataError: if there is nothing at the path, or its format is unknown.
    """
    source = named_source(source)
    if source.limit is not None or (source.clean is not None and source.clean.needs_whole):
        return [source]
    files = None if source.path == "symbols" else locate(source, kind)
    if files is None or len(files.paths) == 1:
        return [source]
    return [SourceSplit.of(source, files, number) for number in range(len(files.paths))]
