"""The lock that lets commands change one index in turn."""

import logging
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from bifocal.hub.search.hits import SearchError

LOCK = ".lock"
_SILENT_WAIT = 3.0  # seconds

logger = logging.getLogger(__name__)


def is_locked(folder: Path) -> bool:
    """Return whether a command is changing an index; False if that cannot be known."""
    from filelock import FileLock, Timeout

    if not (folder / LOCK).exists():
        return False
    try:
        with FileLock(folder / LOCK, timeout=0):
            return False
    except Timeout:
        return True
    except OSError:
        return False


@contextmanager
def index_lock(folder: Path) -> Iterator[None]:
    """Hold the lock of an index; log a warning if another command holds it for long.

    Raises:
        SearchError: if a file of somebody else has the name of the lock.
    """
    from filelock import FileLock, Timeout

    path = folder / LOCK
    with suppress(FileNotFoundError):  # one look, since another command may remove it
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode) or status.st_size:
            raise SearchError(f"'{path}' is not Bifocal's, whose lock is an empty file. Move it away.")
    timeout = _SILENT_WAIT
    while True:
        lock = FileLock(folder / LOCK)
        try:
            lock.acquire(timeout=timeout)
            break
        except Timeout:
            logger.warning(f"Another command is changing '{folder}'. Waiting until it has finished.")
            timeout = -1
        except FileNotFoundError:  # the other command found nothing to index, and deleted the folder
            folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        lock.release()
