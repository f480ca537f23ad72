"""A command that serves a page, as a process of its own."""

import socket
import time
import urllib.request
from pathlib import Path

from tests.processes import Process

ROOT = Path(__file__).parents[3]
# A text of an index that must not act as HTML or JavaScript.
EVIL = "<img src=x onerror=alert(1)> ${alert(2)} {{value}} {{#each value}}"


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


class Server:
    """A process that serves a page, from the moment that it answers at a path until it is stopped."""

    def __init__(self, process: Process, port: int, folder: Path, path: str = "") -> None:
        self.process = process
        self.folder = folder
        self.path = path
        self.address = f"http://127.0.0.1:{port}"

    def __enter__(self) -> "Server":
        for _ in range(6000):
            try:
                urllib.request.urlopen(self.address + self.path, timeout=5).close()
                return self
            except OSError:
                if not self.process.running:
                    break
                time.sleep(0.02)
        raise AssertionError(f"The server did not start: {self.process.stderr[-2000:]}")

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.finish(30)
