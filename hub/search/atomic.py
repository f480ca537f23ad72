"""The one way in which an index writes a file: whole or not at all.

Not `bifocal.files`, which asks whose a file is and which a Space does not ship: an index writes files by names of its
own, into folders of its own.
"""

import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path that replaces `path` at the end; after an error, `path` is as it was.

    A killed process leaves its temporary file, see `temporary_files`.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def temporary_files(folder: Path, pattern: str) -> list[Path]:
    """Return the unfinished versions of files whose names match a pattern."""
    unfinished = re.compile(r".*\.\d+-\d+")
    return [path for path in folder.glob(f".{pattern}.*-*") if unfinished.fullmatch(path.name)]
