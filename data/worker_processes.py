"""Tasks in several processes of this machine, for `parallel`."""

import contextlib
import glob
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from bifocal.data.task_outcomes import NotStarted, Worker, attempt, make
from bifocal.errors import BifocalError

_GRACE = 5.0  # seconds in which a stopped process may clean up


class WorkerDiedError(BifocalError):
    """A process that ran tasks was killed, and the run with it."""


def run_in_processes(tasks: list[Any], make_worker: Callable[[], Worker], workers: int) -> Iterator[tuple[Any, Any]]:
    context = multiprocessing.get_context("spawn")  # a forked process could use neither CUDA nor threads
    # The other end of this pipe closes when the iteration stops or this process ends, however it ends.
    alive, end = context.Pipe(duplex=False)
    setup = (make_worker, workers, context.Value("i", 0), alive)
    with alive, end, ProcessPoolExecutor(workers, context, _start, setup) as pool:
        try:
            futures = {pool.submit(_run, task): task for task in tasks}
            for future in as_completed(futures):
                yield futures.pop(future), future.result()
        except BrokenProcessPool:
            raise WorkerDiedError(
                "A worker process was killed, perhaps because memory ran out. Run the command again, with fewer "
                "--workers if it happens again."
            ) from None
        finally:
            if futures:
                end.close()
                pool.shutdown(cancel_futures=True)


class _Process:
    """What a process of `run_in_processes` keeps from task to task."""

    worker: Any = None
    busy = False


def _start(make_worker: Callable[[], Worker], workers: int, started: Any, alive: Any) -> None:
    """Prepare a process: its end, its threads, its GPU, and its worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl+C reaches all processes; the first one stops the others
    signal.signal(signal.SIGTERM, _stop)
    threading.Thread(target=_stop_with, args=(alive,), daemon=True).start()
    with started.get_lock():
        number, started.value = started.value, started.value + 1
    _share_threads(workers)
    _share_gpus(number)
    _Process.worker = make(make_worker)


def _stop(*_: object) -> None:
    if not _Process.busy:
        os._exit(1)
    raise KeyboardInterrupt  # what the task has begun to write is removed


def _stop_with(alive: Any) -> None:
    with contextlib.suppress(EOFError, OSError):
        alive.recv()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_GRACE)
    os._exit(1)


def available_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _share_threads(workers: int) -> None:
    if "OMP_NUM_THREADS" in os.environ:  # the user's choice
        return
    threads = max(1, available_cores() // workers)
    for name in ("OMP_NUM_THREADS", "RAYON_NUM_THREADS"):  # of torch and pyarrow, and of tokenizers
        os.environ.setdefault(name, str(threads))
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(threads)


def _share_gpus(number: int) -> None:
    """Let CUDA see one GPU, a different one in each process if there are enough."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible is not None else [str(n) for n in range(len(glob.glob("/dev/nvidia[0-9]*")))]
    if len(gpus) > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[number % len(gpus)]


def _run(task: Any) -> Any:
    if isinstance(_Process.worker, NotStarted):
        return _Process.worker
    _Process.busy = True
    try:
        return attempt(_Process.worker, task)
    except KeyboardInterrupt:
        os._exit(1)
    finally:
        _Process.busy = False
