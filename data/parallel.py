"""Runs independent tasks in this process, in several, or on a Ray cluster.

A task is a small picklable value, such as a file to read and a file to write. A worker does one task at a time and
returns a small picklable result; what is large it writes itself, whole or not at all, so that a task can be done twice.
"""

import contextlib
import glob
import logging
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, TypeVar

from bifocal.errors import BifocalError, first_line

Task = TypeVar("Task")
Result = TypeVar("Result")
_Worker = Callable[[Any], Any]

_GRACE = 5.0  # seconds in which a stopped process may clean up
_RETRIES = 3  # of a task on Ray whose actor was killed
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Execution:
    """How tasks are run.

    Args:
        workers: processes on this machine; 1 means this process. Each gets its share of the cores, and of the GPUs in
            turn.
        ray: address of a Ray cluster as for `ray.init`; "local" starts one on this machine, which ends with the tasks.
        num_gpus, num_cpus: GPUs and CPUs that Ray reserves for each actor; fractions share one.
        concurrency: number of Ray actors; None means as many as fit the nodes of the cluster.

    Raises:
        BifocalError: if values exclude each other, or Ray is not installed.
    """

    workers: int = 1
    ray: str | None = None
    num_gpus: float = 0.0
    num_cpus: float = 1.0
    concurrency: int | None = None

    def __post_init__(self) -> None:
        if self.workers < 1 or (self.concurrency is not None and self.concurrency < 1):
            raise BifocalError("The number of workers must be at least 1.")
        if self.num_gpus < 0 or self.num_cpus < 0 or not (self.num_gpus or self.num_cpus):
            raise BifocalError("A Ray actor needs a part of a CPU or GPU. Give num_cpus or num_gpus above 0.")
        if self.ray is None:
            if self.concurrency is not None or self.num_gpus:
                raise BifocalError("--concurrency and --num-gpus are for actors on Ray. Pass --ray, or use --workers.")
            return
        if self.workers > 1:
            raise BifocalError("Processes on this machine (--workers) and Ray (--ray) exclude each other. Give one.")
        if find_spec("ray") is None or find_spec("pyarrow") is None:
            raise BifocalError("--ray needs Ray. Run pip install 'bifocal[ray]'.")


@dataclass(frozen=True)
class TaskFailed:
    """A task that failed for good: its name, and the message of its error."""

    name: str
    message: str


class WorkerDiedError(BifocalError):
    """A process that ran tasks was killed, and the run with it."""


def run_tasks(
    tasks: Iterable[Task],
    make_worker: Callable[[], Callable[[Task], Result]],
    execution: Execution,
    name_of: Callable[[Task], str],
) -> Iterator[Result | TaskFailed]:
    """Yield the result of each task as it is done, in any order.

    A task that raises gives a `TaskFailed`, and the others are done. Stopping the iteration, also by Ctrl+C, stops all
    workers. On Ray, a task whose actor is killed is done again, a few times at most.

    Args:
        tasks: picklable values.
        make_worker: called once in each process; picklable.
        execution: how the tasks are run.
        name_of: name of a task for messages.

    Raises:
        BifocalError: if `make_worker` raises it, or there is no such Ray cluster.
        WorkerDiedError: if a process on this machine was killed; results up to then were yielded.
    """
    tasks = list(tasks)
    if not tasks:
        return
    if execution.ray is not None:
        outcomes = _on_ray(tasks, make_worker, execution)
    elif min(execution.workers, len(tasks)) > 1:
        outcomes = _in_processes(tasks, make_worker, min(execution.workers, len(tasks)))
    else:
        outcomes = _in_this_process(tasks, make_worker)
    with contextlib.closing(outcomes):  # type: ignore[type-var]  # they are generators
        for task, outcome in outcomes:
            if isinstance(outcome, _NotStarted):
                raise outcome.error
            if isinstance(outcome, _Raised):
                if outcome.trace:
                    _logger.error("%s: %s", name_of(task), outcome.trace)
                outcome = TaskFailed(name_of(task), outcome.message)
            yield outcome


@dataclass(frozen=True)
class _Raised:
    """An error of a task: its message, and its stack trace unless a user can fix it."""

    message: str
    trace: str = ""


@dataclass(frozen=True)
class _NotStarted:
    """An error of `make_worker`, which every other process would repeat."""

    error: Exception


def _attempt(worker: _Worker, task: Any) -> Any:
    """Return the result of a task, or its error."""
    try:
        return worker(task)
    except BifocalError as error:
        return _Raised(str(error))
    except OSError as error:
        return _Raised(first_line(error))
    except Exception as error:
        return _Raised(f"{type(error).__name__}: {first_line(error)}", traceback.format_exc())


def _make(make_worker: Callable[[], _Worker]) -> _Worker | _NotStarted:
    try:
        return make_worker()
    except Exception as error:
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:  # an error whose constructor takes other arguments than it keeps
            error = RuntimeError(traceback.format_exc())
        return _NotStarted(error)


def _in_this_process(tasks: list[Any], make_worker: Callable[[], _Worker]) -> Iterator[tuple[Any, Any]]:
    worker = make_worker()
    for task in tasks:
        yield task, _attempt(worker, task)


def _in_processes(tasks: list[Any], make_worker: Callable[[], _Worker], workers: int) -> Iterator[tuple[Any, Any]]:
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
    """What a process of `_in_processes` keeps from task to task."""

    worker: Any = None
    busy = False


def _start(make_worker: Callable[[], _Worker], workers: int, started: Any, alive: Any) -> None:
    """Prepare a process: its end, its threads, its GPU, and its worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl+C reaches all processes; the first one stops the others
    signal.signal(signal.SIGTERM, _stop)
    threading.Thread(target=_stop_with, args=(alive,), daemon=True).start()
    with started.get_lock():
        number, started.value = started.value, started.value + 1
    _share_threads(workers)
    _share_gpus(number)
    _Process.worker = _make(make_worker)


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
    if isinstance(_Process.worker, _NotStarted):
        return _Process.worker
    _Process.busy = True
    try:
        return _attempt(_Process.worker, task)
    except KeyboardInterrupt:
        os._exit(1)
    finally:
        _Process.busy = False


def _on_ray(tasks: list[Any], make_worker: Callable[[], _Worker], execution: Execution) -> Iterator[tuple[Any, Any]]:
    """Run tasks as a data set of Ray Data, one row and block each, mapped by a pool of actors.

    Ray restarts killed actors and repeats their tasks. Its rows need no reading tasks, which actors that hold all CPUs
    would keep from starting.
    """
    address = str(execution.ray)
    _require_reachable(address)
    # Ray and its actors print their warnings to the standard output, which is for the results of a command.
    with contextlib.redirect_stdout(sys.stderr):
        yield from _on_cluster(tasks, make_worker, execution, address)


def _on_cluster(
    tasks: list[Any], make_worker: Callable[[], _Worker], execution: Execution, address: str
) -> Iterator[tuple[Any, Any]]:
    started = _connect(address)
    import ray
    import ray.data

    try:
        rows = [{"number": number, "task": pickle.dumps(task)} for number, task in enumerate(tasks)]
        with _settings_of_ray_data():
            results = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
                _Actor,
                fn_constructor_args=(make_worker, os.getcwd()),
                compute=ray.data.ActorPoolStrategy(
                    size=min(len(tasks), _actors(execution)), max_tasks_in_flight_per_actor=1
                ),
                batch_size=1,
                batch_format="pyarrow",
                num_cpus=execution.num_cpus,
                num_gpus=execution.num_gpus or None,
                max_restarts=-1,
                max_task_retries=_RETRIES,  # as often as the actor dies, by default
            )
        missing = dict(enumerate(tasks))
        for row in results.iter_rows():
            yield missing.pop(row["number"]), pickle.loads(row["result"])
        for task in missing.values():
            yield task, _Raised(f"its process was killed {_RETRIES + 1} times, perhaps because memory ran out")
    finally:
        if started:
            ray.shutdown()


def _require_reachable(address: str) -> None:
    """Check that a server listens at an address with a port; Ray would wait for one for minutes.

    Raises:
        BifocalError: if none does.
    """
    host, colon, port = address.rpartition("://")[2].rpartition(":")
    if colon and port.isdigit():
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        except OSError as error:
            raise _not_usable(address, error) from error


def _connect(address: str) -> bool:
    """Connect to a Ray cluster, or start one, unless this process has one; return whether it had none.

    Raises:
        BifocalError: if no cluster answers, or it runs other versions of Ray or Python.
    """
    if address == "local":
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would report to Ray's makers
    import ray

    if ray.is_initialized():
        return False
    options: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
    try:
        ray.init(address, logging_level=logging.ERROR, **options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise _not_usable(address, error) from error
    return True


def _not_usable(address: str, error: Exception) -> BifocalError:
    return BifocalError(
        f"The Ray cluster '{address}' cannot be used ({first_line(error)}). Start one with `ray start --head`, or use "
        "--ray local."
    )


def _actors(execution: Execution) -> int:
    """Return how many actors to start.

    Raises:
        BifocalError: if none fits, which would mean to wait forever.
    """
    import ray

    wanted = {"CPU": execution.num_cpus, "GPU": execution.num_gpus}
    fitting = 0
    for node in ray.nodes():
        if node["Alive"]:
            has = node["Resources"]
            fitting += min(int(has.get(name, 0.0) / share + 1e-6) for name, share in wanted.items() if share)
    if not fitting and (execution.concurrency is None or execution.ray == "local"):
        raise BifocalError(
            f"No node of the Ray cluster has the {execution.num_cpus:g} CPUs and {execution.num_gpus:g} GPUs that a "
            "worker needs. Ask for less, or give --concurrency if the cluster adds nodes on demand."
        )
    return execution.concurrency or fitting


@contextlib.contextmanager
def _settings_of_ray_data() -> Iterator[None]:
    """Set what a data set of Ray Data takes over when it is made; it logs to its file alone."""
    from ray.data import DataContext

    for handler in logging.getLogger("ray.data").handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setLevel(logging.CRITICAL)
    settings = {
        "enable_progress_bars": False,
        "print_on_execution_start": False,
        "max_errored_blocks": -1,  # a task that kills each actor; others go on, and it is reported at the end
        "execution_no_progress_timeout_s": -1,  # a task may take long
    }
    context = DataContext.get_current()
    settings = {name: value for name, value in settings.items() if hasattr(context, name)}  # not in each version
    before = {name: getattr(context, name) for name in settings}
    for name, value in settings.items():
        setattr(context, name, value)
    try:
        with warnings.catch_warnings():
            # Ray 2.64 removes the limits of restarts and retries; see its requirement in pyproject.toml.
            warnings.filterwarnings("ignore", message="`ray_remote_args` is deprecated")
            yield
    finally:
        for name, value in before.items():
            setattr(context, name, value)


class _Actor:
    """A worker on Ray.

    Args:
        make_worker: makes the worker.
        folder: working directory of the command, which relative paths mean on each node that has it.
    """

    def __init__(self, make_worker: Callable[[], _Worker], folder: str) -> None:
        with contextlib.suppress(OSError):
            os.chdir(folder)
        self.worker = _make(make_worker)

    def __call__(self, row: Any) -> Any:
        import pyarrow as pa

        outcome: Any = self.worker
        if not isinstance(outcome, _NotStarted):
            outcome = _attempt(outcome, pickle.loads(row["task"][0].as_py()))
        try:
            result = pickle.dumps(outcome)
        except Exception as error:
            result = pickle.dumps(_Raised(f"its result cannot be sent ({first_line(error)})", traceback.format_exc()))
        return pa.table({"number": row["number"], "result": [result]})
