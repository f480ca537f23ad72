"""A command that serves a page, as a process of its own."""

import os
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).parents[3]
# A text of an index that must not act as HTML or JavaScript.
EVIL = "<img src=x onerror=alert(1)> ${alert(2)} {{value}} {{#each value}}"


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


class Server:
    """A command that serves, waited for and ended."""

    def __init__(self, command: list[str], port: int, folder: Path, **environment: str) -> None:
        self.folder = folder
        self.address = f"http://127.0.0.1:{port}"
        self.log = (folder / "server.log").open("w+")
        variables = {**os.environ, "PYTHONPATH": str(ROOT), "GRADIO_TEMP_DIR": str(folder / "uploads"), **environment}
        self.process = subprocess.Popen(command, env=variables, cwd=folder, stdout=self.log, stderr=self.log)

    def __enter__(self) -> "Server":
        for _ in range(240):
            try:
                urllib.request.urlopen(self.address, timeout=5).close()
                return self
            except OSError:
                if self.process.poll() is not None:
                    break
                time.sleep(0.5)
        self.log.seek(0)
        raise AssertionError(f"The server did not start: {self.log.read()[-2000:]}")

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait(timeout=30)
        self.log.close()
