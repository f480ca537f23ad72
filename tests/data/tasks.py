"""Tasks for the tests of `bifocal.data.parallel`; the processes that do them import this module."""

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bifocal.errors import BifocalError, ModelError


@dataclass(frozen=True)
class Square:
    """A number to square.

    Args:
        trouble: "raise", "bug", "kill" (its process, each time), or "kill once".
        seconds: time that it takes.
    """

    number: int
    trouble: str = ""
    seconds: float = 0.0

    @property
    def name(self) -> str:
        return f"square {self.number}"


@dataclass(frozen=True)
class Squared:
    number: int
    square: int
    process: int
    threads: str | None
    gpu: str | None


@dataclass(frozen=True)
class MakeSquarer:
    """Makes a worker that notes its process, its parent and the tasks that it begins, each in a file of the folder."""

    folder: Path
    trouble: str = ""

    def __call__(self) -> Callable[[Square], Squared]:
        if self.trouble == "raise":
            raise ModelError("There is no model.")
        if self.trouble == "bug":
            raise KeyError("weights")
        self.append("processes.txt", os.getpid())
        self.append("parents.txt", os.getppid())
        return self.square

    def square(self, task: Square) -> Squared:
        before = self.lines("begun.txt").count(str(task.number))
        try:  # from before it is known to have begun
            self.append("begun.txt", task.number)
            if task.trouble == "raise":
                raise BifocalError(f"{task.number} is unlucky.")
            if task.trouble == "bug":
                raise KeyError(task.number)
            if task.trouble == "kill" or (task.trouble == "kill once" and not before):
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(task.seconds)
        except KeyboardInterrupt:
            self.append("removed.txt", task.number)
            raise
        threads, gpu = os.environ.get("OMP_NUM_THREADS"), os.environ.get("CUDA_VISIBLE_DEVICES")
        return Squared(task.number, task.number**2, os.getpid(), threads, gpu)

    def append(self, file: str, value: object) -> None:
        with (self.folder / file).open("a") as lines:
            lines.write(f"{value}\n")

    def lines(self, file: str) -> list[str]:
        path = self.folder / file
        return path.read_text().split() if path.exists() else []
