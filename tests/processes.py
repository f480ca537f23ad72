"""Python processes that start in a moment, since the imports of other libraries are done when they begin.

A fork server imports what takes long (torch, transformers, datasets, sentence-transformers, matplotlib), never computes
anything, and forks a process for each call. Bifocal is not imported there, so that a process sees its own import, or
none. Tests of what Python itself does at the start (installing, `import bifocal` alone) run `sys.executable` instead.

What libraries read from the environment while they are imported is the server's: `HF_HOME` and `HF_ENDPOINT`, which are
a folder of the tests' and the address of `tests.hub_stand_in`. Processes are offline unless they are given `hub=True`.
"""

import atexit
import gc
import multiprocessing
import os
import runpy
import shutil
import socket
import sys
import tempfile
import time
import types
from functools import cache
from multiprocessing import forkserver
from pathlib import Path
from subprocess import CompletedProcess

HEAVY = ("torch", "datasets", "sentence_transformers", "matplotlib.pyplot")
LONGEST = 300.0  # seconds


# `tests.hub_stand_in` listens here; the port is held, so that nobody else takes it before or after.
_HELD = socket.socket()
_HELD.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
_HELD.bind(("127.0.0.1", 0))
HUB_ADDRESS: tuple[str, int] = _HELD.getsockname()
_FOLDER = tempfile.TemporaryDirectory(prefix="bifocal-tests-")
HUB_HOME = Path(_FOLDER.name) / "home"


def forget_hub(home: Path | None = None) -> None:
    """Remove all that processes loaded from the Hub; let them keep it in another folder from now on."""
    if HUB_HOME.is_symlink():
        HUB_HOME.unlink()
    shutil.rmtree(HUB_HOME, ignore_errors=True)
    if home is not None:
        HUB_HOME.symlink_to(home)


def skip_if_quick() -> None:
    """Skip a test that starts processes in `make test-quick`."""
    if os.environ.get("BIFOCAL_TESTS") == "quick":
        import pytest  # not at the top: the processes themselves import this module

        pytest.skip("starts a process")


@cache
def server() -> multiprocessing.context.ForkServerContext:
    """Start the fork server; return the context of its processes."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(HEAVY))
    address = f"http://{HUB_ADDRESS[0]}:{HUB_ADDRESS[1]}"
    online = {"HF_ENDPOINT": address, "HF_HOME": str(HUB_HOME), "HF_HUB_DISABLE_XET": "1"}
    before = dict(os.environ)
    for name in [name for name in before if name.startswith("HF_")]:
        del os.environ[name]
    os.environ.update(online)
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return context


class Process:
    """`python COMMAND`, begun.

    Args:
        command: `-m MODULE`, `-c CODE` or a script, and its arguments; `-I` before a script keeps its folder out of
            the path.
        cwd: its working directory.
        hub: let it reach the Hub's stand-in.
        environment: variables besides this process's own.
    """

    def __init__(self, *command: str | Path, cwd: Path | None = None, hub: bool = False, **environment: str) -> None:
        skip_if_quick()
        self.command = [str(part) for part in command]
        self.folder = Path(tempfile.mkdtemp(prefix="bifocal-process-"))
        variables = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        variables |= {"HF_HUB_OFFLINE": "0" if hub else "1"} | environment
        arguments = (self.command, str(cwd or Path.cwd()), variables, str(self.folder))
        self.process = server().Process(target=_python, args=arguments)
        self.process.start()

    @property
    def running(self) -> bool:
        return self.process.is_alive()

    @property
    def stderr(self) -> str:
        """What it has written so far."""
        path = self.folder / "stderr"
        return path.read_text(errors="replace") if path.exists() else ""

    def kill(self) -> None:
        """Send SIGKILL."""
        self.process.kill()

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.process.terminate()

    def finish(self, timeout: float = LONGEST) -> CompletedProcess:
        """Wait for its end; return its exit code and what it wrote."""
        self.process.join(timeout)
        if late := self.running:
            self.kill()
            self.process.join()
        texts = [(self.folder / name).read_text(errors="replace") for name in ("stdout", "stderr")]
        shutil.rmtree(self.folder)
        code = self.process.exitcode
        self.process.close()
        assert not late, f"{self.command} took more than {timeout} s:\n{texts[1][-3000:]}"
        return CompletedProcess(self.command, code, *texts)


def run(
    *command: str | Path, cwd: Path | None = None, hub: bool = False, timeout: float = LONGEST, **environment: str
) -> CompletedProcess:
    """Run `python COMMAND` to its end; see `Process`."""
    return Process(*command, cwd=cwd, hub=hub, **environment).finish(timeout)


def run_ranks(count: int, *command: str | Path, cwd: Path | None = None, **environment: str) -> list[CompletedProcess]:
    """Run a command in several processes that find each other as those of torchrun do; each gets one thread."""
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    common = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1"}
    common |= {"MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True", "OMP_NUM_THREADS": "1"}
    ranks = [
        Process(*command, cwd=cwd, RANK=str(rank), LOCAL_RANK=str(rank), **common, **environment)
        for rank in range(count)
    ]
    deadline = time.monotonic() + LONGEST
    while any(rank.running for rank in ranks) and time.monotonic() < deadline:
        if any(rank.process.exitcode for rank in ranks):  # the others would wait for it
            break
        time.sleep(0.05)
    for rank in ranks:
        rank.kill()
    return [rank.finish() for rank in ranks]


def _python(command: list[str], cwd: str, environment: dict[str, str], output: str) -> None:
    """Be `python COMMAND`, in a process just forked."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(os.path.join(output, name), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    # The path is that of the tests, where transformers may have put code that it loaded for them.
    sys.path = [entry for entry in sys.path if not os.path.isdir(os.path.join(entry, "transformers_modules"))]
    multiprocessing.set_start_method(None, force=True)  # data workers of its own start as they always do
    _settle(environment)
    try:
        if command[0] == "-c":
            main = types.ModuleType("__main__")
            sys.modules["__main__"], sys.argv = main, ["-c", *command[2:]]
            sys.path.insert(0, "")
            exec(compile(command[1], "<string>", "exec"), main.__dict__)
        elif command[0] == "-m":
            sys.argv = command[1:]
            sys.path.insert(0, cwd)
            runpy.run_module(command[1], run_name="__main__", alter_sys=True)
        else:
            isolated = command[0] == "-I"
            sys.argv = command[isolated:]
            if not isolated:
                sys.path.insert(0, os.path.dirname(os.path.abspath(command[0])))
            runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # a forked process ends without them


def _settle(environment: dict[str, str]) -> None:
    """What a new process would have read from its environment, or drawn."""
    import huggingface_hub
    import numpy
    import torch

    gc.freeze()  # see tests/conftest.py
    numpy.random.seed()
    threads = environment.get("OMP_NUM_THREADS", "")
    if threads:
        torch.set_num_threads(int(threads))
    offline = environment["HF_HUB_OFFLINE"] == "1"
    huggingface_hub.constants.HF_HUB_OFFLINE = offline
    datasets = sys.modules.get("datasets")
    if datasets is not None:  # with the oldest huggingface_hub (`make test-floor`) it cannot be imported
        datasets.config.HF_HUB_OFFLINE = datasets.config.HF_DATASETS_OFFLINE = offline
