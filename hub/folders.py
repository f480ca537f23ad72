"""Folders that are made whole or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def made_whole(folder: Path) -> Iterator[Path]:
    """A path beside `folder`: what is made there takes its place at the end, and after an error nothing is left.

    Args:
        folder: its place; what is there is replaced, so look first whether it may be.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        made = scratch / folder.name
        yield made
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(made, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def require_replaceable(folder: Path) -> None:
    """
    Raises:
        FileExistsError: something is there that is neither a model nor an empty folder.
    """
    empty = folder.is_dir() and not any(folder.iterdir())
    if folder.exists() and not empty and not (folder / "config.json").exists():
        raise FileExistsError(f"'{folder}' holds something that is no model; choose another folder or remove it.")
