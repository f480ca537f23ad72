"""Runs independent tasks in this process, in several, or on a Ray cluster.

A task is a small picklable value, such as a file to read and a file to write. A worker does one task at a time and
returns a small picklable result; what is large it writes itself, whole or not at all, so that a task can be done twice.
"""

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, TypeVar

from bifocal.data.ray_actors import run_on_ray
from bifocal.data.task_outcomes import NotStarted, Raised, Worker, attempt
from bifocal.data.worker_processes import run_in_processes
from bifocal.errors import BifocalError

Task = TypeVar("Task")
Result = TypeVar("Result")

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
        outcomes = run_on_ray(tasks, make_worker, execution)
    elif min(execution.workers, len(tasks)) > 1:
        outcomes = run_in_processes(tasks, make_worker, min(execution.workers, len(tasks)))
    else:
        outcomes = _in_this_process(tasks, make_worker)
    with contextlib.closing(outcomes):  # type: ignore[type-var]  # they are generators
        for task, outcome in outcomes:
            if isinstance(outcome, NotStarted):
                raise outcome.error
            if isinstance(outcome, Raised):
                if outcome.trace:
                    _logger.error("%s: %s", name_of(task), outcome.trace)
                outcome = TaskFailed(name_of(task), outcome.message)
            yield outcome


def _in_this_process(tasks: list[Any], make_worker: Callable[[], Worker]) -> Iterator[tuple[Any, Any]]:
    worker = make_worker()
    for task in tasks:
        yield task, attempt(worker, task)
