"""A new Python interpreter that forks for each piece of code, so that the imports they share are paid for once.

`tests.processes` has the heavy packages imported; here a test chooses, and can look at what its code imports besides.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import CompletedProcess

_PARENT = """
import atexit, gc, importlib, json, multiprocessing, os, sys

def execute(code, folder, output, arguments):
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{output}/{name}", os.O_WRONLY | os.O_CREAT), number)
    os.chdir(folder)
    sys.argv[1:] = arguments
    try:
        exec(code, {"__name__": "__main__"})
    finally:
        atexit._run_exitfuncs()  # a forked process ends without them

for name in sys.argv[1:]:
    importlib.import_module(name)
gc.freeze()  # the forks share the memory of what is imported
for line in sys.stdin:
    child = multiprocessing.get_context("fork").Process(target=execute, args=json.loads(line))
    child.start()
    child.join(300)
    print(child.exitcode, flush=True)
"""


@contextmanager
def interpreter(*modules: str) -> Iterator[Callable[..., CompletedProcess]]:
    """Start Python, import the modules; yield a function that does what `python -c CODE ARGUMENTS` does, in a fork."""
    with subprocess.Popen(
        [sys.executable, "-c", _PARENT, *modules], env={**os.environ, "HF_HUB_OFFLINE": "1"}, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as parent:  # fmt: skip
        assert parent.stdin is not None
        assert parent.stdout is not None

        def run(code: str, *arguments: str, cwd: Path | None = None) -> CompletedProcess:
            with tempfile.TemporaryDirectory() as output:
                print(json.dumps([code, str(cwd or Path.cwd()), output, arguments]), file=parent.stdin, flush=True)
                exit_code = int(parent.stdout.readline())
                texts = (Path(output, name).read_text() for name in ("stdout", "stderr"))
                return CompletedProcess([code, *arguments], exit_code, *texts)

        yield run
