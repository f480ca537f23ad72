"""Tasks on a Ray cluster, for `parallel`."""

import contextlib
import logging
import os
import pickle
import socket
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from bifocal.data.task_outcomes import NotStarted, Raised, Worker, attempt, make
from bifocal.errors import BifocalError, first_line

if TYPE_CHECKING:
    from bifocal.data.parallel import Execution

_RETRIES = 3  # of a task on Ray whose actor was killed


def run_on_ray(
    tasks: list[Any], make_worker: Callable[[], Worker], execution: "Execution"
) -> Iterator[tuple[Any, Any]]:
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
    tasks: list[Any], make_worker: Callable[[], Worker], execution: "Execution", address: str
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
            yield task, Raised(f"its process was killed {_RETRIES + 1} times, perhaps because memory ran out")
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


def _actors(execution: "Execution") -> int:
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

    def __init__(self, make_worker: Callable[[], Worker], folder: str) -> None:
        with contextlib.suppress(OSError):
            os.chdir(folder)
        self.worker = make(make_worker)

    def __call__(self, row: Any) -> Any:
        import pyarrow as pa

        outcome: Any = self.worker
        if not isinstance(outcome, NotStarted):
            outcome = attempt(outcome, pickle.loads(row["task"][0].as_py()))
        try:
            result = pickle.dumps(outcome)
        except Exception as error:
            result = pickle.dumps(Raised(f"its result cannot be sent ({first_line(error)})", traceback.format_exc()))
        return pa.table({"number": row["number"], "result": [result]})
