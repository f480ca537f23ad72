"""Checks what `bifocal embed` is asked for, before a model is loaded. Imports nothing heavy."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from bifocal.errors import BifocalError

PRECISIONS = ("float32", "float16", "int8")
SETTINGS = "_embed.json"  # readers of the folder skip names with an underscore
_SCRATCH = re.compile(r"\.(_embed|part-[\d-]+)\.[0-9a-f]{8}\.\w+")  # of a run that was killed while it wrote


class EmbedError(BifocalError):
    """A run of `bifocal embed` that cannot start, resume or finish."""


def require_precision(precision: str) -> None:
    """Check the name of a precision.

    Raises:
        EmbedError: if it is unknown.
    """
    if precision not in PRECISIONS:
        raise EmbedError(f"'{precision}' is not a precision. Choose one of {', '.join(PRECISIONS)}.")


def require_table_or_nothing(address: str, files: Sequence[str] | None = None) -> None:
    """Check that an address holds a table that `bifocal embed` wrote, or nothing.

    Args:
        address: a folder, or an address of an object store.
        files: names of the files there; those of the folder if None.

    Raises:
        EmbedError: if it holds other files, or is a file.
    """
    if files is None:
        folder = Path(address).expanduser()
        if "://" in address or not folder.exists():
            return
        if not folder.is_dir():
            raise EmbedError(f"'{address}' is a file. Choose a new or empty folder.")
        files = os.listdir(folder)
    if SETTINGS not in files and any(not _SCRATCH.fullmatch(name) for name in files):
        raise EmbedError(f"'{address}' holds other files. Choose a new or empty folder.")
