"""Checks what `bifocal serve --static` is asked for. Imports nothing heavy, so that it is quick."""

from pathlib import Path

from bifocal.errors import BifocalError
from bifocal.hub.search.index import SearchIndex
from bifocal.hub.space_arguments import check_space
from bifocal.hub.static_site.npm import require_tarballs

SITE = "static site"  # kind of the folder in its list of files
MAX_ITEMS = 200_000  # a browser loads all vectors, and scores each of them for each query


class SiteError(BifocalError):
    """A static site that cannot be written."""


def check_site(index: SearchIndex, out: Path, model: str, npm_packages: Path | None = None) -> None:
    """Check the arguments of `write_site`.

    Raises:
        SiteError, SearchError, PackageError, NotOursError: as `write_site`.
    """
    check_space(index, out, model, SITE)
    require_tarballs(npm_packages)
    rows = sum(map(len, index.snapshot().tables))
    if rows == 0:
        raise SiteError(f"The index '{index.folder}' is empty. Add something with bifocal index.")
    if rows > MAX_ITEMS:
        raise SiteError(
            f"The index '{index.folder}' has {rows:,} items, but a browser searches {MAX_ITEMS:,} at most. Serve it "
            "with a server: bifocal serve --space."
        )
