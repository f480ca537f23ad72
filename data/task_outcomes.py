"""What a task gives: its result, or its error in a form that processes can send."""

import pickle
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bifocal.errors import BifocalError, first_line

Worker = Callable[[Any], Any]


@dataclass(frozen=True)
class Raised:
    """An error of a task: its message, and its stack trace unless a user can fix it."""

    message: str
    trace: str = ""


@dataclass(frozen=True)
class NotStarted:
    """An error of `make_worker`, which every other process would repeat."""

    error: Exception


def attempt(worker: Worker, task: Any) -> Any:
    """Return the result of a task, or its error."""
    try:
        return worker(task)
    except BifocalError as error:
        return Raised(str(error))
    except OSError as error:
        return Raised(first_line(error))
    except Exception as error:
        return Raised(f"{type(error).__name__}: {first_line(error)}", traceback.format_exc())


def make(make_worker: Callable[[], Worker]) -> Worker | NotStarted:
    try:
        return make_worker()
    except Exception as error:
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:  # an error whose constructor takes other arguments than it keeps
            error = RuntimeError(traceback.format_exc())
        return NotStarted(error)
