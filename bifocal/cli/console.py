"""What all commands share: stop with a sentence, and know which errors deserve one."""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

import typer

from bifocal.errors import BifocalError

# The disk is full or read-only, the folder not ours, or a file stands where a folder should be.
_UNWRITABLE = (
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EEXIST, errno.ENOTDIR, errno.EISDIR,
)  # fmt: skip


def require(*modules: str) -> None:
    """Stop now, and not after the training, if an extra is not installed."""
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        fail(f"This command needs {', '.join(missing)}, not installed here; pip install 'bifocal[all]' brings them.")


def cannot_write(error: Exception, folder: Path) -> bool:
    """Whether an error means that the disk is full or may not be written.

    Not every library says so with an OSError: safetensors has an error of its own and torch a RuntimeError.
    """
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _UNWRITABLE
    existing = next(path for path in [folder, *folder.absolute().parents] if path.exists())
    return "No space left" in str(error) or shutil.disk_usage(existing).free < 2**20


def sentence(error: Exception) -> str:
    """What an error says; one that comes from a data worker brings that worker's traceback before it."""
    return str(error).strip().splitlines()[-1].rpartition("Error: ")[2]


def fail(message: str) -> NoReturn:
    # A name that is no UTF-8 could not be printed.
    typer.echo(f"Error: {message}".encode("utf-8", "backslashreplace").decode(), err=True)
    raise typer.Exit(1)


@contextmanager
def one_sentence(folder: Path, remedy: str = "free space or choose another place") -> Iterator[None]:
    """Errors that a user can do something about end the command with one sentence; others stay as they are.

    Args:
        folder: what is written into.
        remedy: what to do where that fails.
    """
    try:
        yield
    except typer.Exit:
        raise
    except (BifocalError, FloatingPointError) as error:
        fail(sentence(error))
    except Exception as error:
        if not cannot_write(error, folder):
            raise
        fail(f"Cannot write to {folder} ({error}); {remedy}.")
