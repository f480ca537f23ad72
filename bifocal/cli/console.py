"""Shared by all commands: checks for extras, and one sentence instead of a stack trace for errors that users can fix.

A command raises a `BifocalError` for such an error, and calls `writes_into` with the folder that it writes into.
"""

import errno
import shutil
from contextvars import ContextVar
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from bifocal.dtypes import DtypeChoice
from bifocal.errors import BifocalError

# The disk is full or read-only, the folder not ours, or a file stands where a folder should be.
_UNWRITABLE = (
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EEXIST, errno.ENOTDIR, errno.EISDIR,
)  # fmt: skip
NumWorkers = Annotated[
    int | None,
    typer.Option(min=0, help="Threads that decode images ahead of the model; if omitted, one per core, 16 at most."),
]
Workers = Annotated[
    int, typer.Option(min=1, help="Processes on this machine that share the files of the source.")
]  # fmt: skip
Ray = Annotated[
    str | None,
    typer.Option(
        metavar="ADDRESS", help="Ray cluster that shares the files of the source; local starts one on this machine."
    ),
]
FAST_DECODING = "Decode large JPEGs at reduced scale: faster, and vectors differ slightly."
FastDecoding = Annotated[bool, typer.Option("--fast-decoding", help=FAST_DECODING)]
_OUTPUT: ContextVar[tuple[Path, str] | None] = ContextVar("folder that the command writes into, and remedy")


_AUTO = "auto: bfloat16 where the device multiplies in it."
Dtype = Annotated[
    DtypeChoice, typer.Option(help=f"Dtype to embed in. model: that of the model's weights. {_AUTO}")
]  # fmt: skip
IndexDtype = Annotated[
    DtypeChoice | None,
    typer.Option(
        help="Dtype to embed in; that of the index if omitted. model: that of the model's weights. auto: in a new "
        "index, bfloat16 where the device multiplies in it."
    ),
]


def require(*modules: str) -> None:
    """Check that the packages a command needs are installed, before it does any work.

    Raises:
        BifocalError: if some are missing.
    """
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        raise BifocalError(f"This command needs {', '.join(missing)}. Run pip install 'bifocal[all]'.")


def writes_into(folder: Path, remedy: str = "free space or choose another folder") -> None:
    """Set the folder that the command writes into; an error that means "cannot write" then ends it with one sentence.

    Args:
        folder: folder that the command writes into.
        remedy: what the user can do if it cannot be written.
    """
    _OUTPUT.set((folder, remedy))


class _ErrorsInOneSentence:
    """Ends a command with one sentence and exit code 1 for errors that a user can fix."""

    def invoke(self, context: Any) -> Any:
        before = _OUTPUT.set(None)
        try:
            return super().invoke(context)  # type: ignore[misc]  # of the classes below
        except (typer.Exit, typer.Abort):
            raise
        except Exception as error:
            message = _sentence(error, _OUTPUT.get())
            if message is None:
                raise
            # A file name that is not UTF-8 could not be printed.
            typer.echo(f"Error: {message}".encode("utf-8", "backslashreplace").decode(), err=True)
            raise typer.Exit(1) from None
        finally:
            _OUTPUT.reset(before)


class Command(_ErrorsInOneSentence, TyperCommand):
    """A command that stands alone."""


class Group(_ErrorsInOneSentence, TyperGroup):
    """The command with all its subcommands."""


def _sentence(error: Exception, output: tuple[Path, str] | None) -> str | None:
    """Return the sentence for an error; None for errors that need a stack trace."""
    if isinstance(error, (BifocalError, FloatingPointError)):
        lines = str(error).strip().splitlines()
        if any(line.startswith("Traceback") or "Original Traceback" in line for line in lines):
            return lines[-1].rpartition("Error: ")[2]  # from a data worker, with that worker's stack trace before it
        return " ".join(lines)
    if output is not None and _cannot_write(error, output[0]):
        folder, remedy = output
        return f"Cannot write to {folder} ({error}); {remedy}."
    return None


def _cannot_write(error: Exception, folder: Path) -> bool:
    """Return whether an error means that the folder cannot be written.

    Not every library raises an OSError for that: safetensors has its own error, torch a RuntimeError.
    """
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _UNWRITABLE
    existing = next(path for path in [folder, *folder.absolute().parents] if path.exists())
    return "No space left" in str(error) or shutil.disk_usage(existing).free < 2**20
