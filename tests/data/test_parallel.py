"""Tasks in one process and in two; `tests/test_ray.py` has those on a Ray cluster."""

import os
import signal
import time
from pathlib import Path

import pytest

from bifocal.data import parallel, ray_actors, worker_processes
from bifocal.data.parallel import Execution, TaskFailed, run_tasks
from bifocal.data.worker_processes import WorkerDiedError
from bifocal.errors import BifocalError, ModelError
from tests.data.tasks import MakeSquarer, Square, Squared
from tests.processes import Process, skip_if_quick

TASKS = [Square(0, seconds=0.3), Square(1), Square(2, "raise"), Square(3, "bug"), Square(4), Square(5)]
FAILED = {TaskFailed("square 2", "2 is unlucky."), TaskFailed("square 3", "KeyError: 3")}
EXECUTIONS = [pytest.param(Execution(), id="one"), pytest.param(Execution(workers=2), id="two")]


def results(tasks: list[Square], make_worker: MakeSquarer, execution: Execution) -> list[Squared | TaskFailed]:
    if execution.workers > 1:
        skip_if_quick()
    return list(run_tasks(tasks, make_worker, execution, lambda task: task.name))


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_each_task_gives_one_result(execution, tmp_path, caplog):
    done = results(TASKS, MakeSquarer(tmp_path), execution)
    squares = [result for result in done if isinstance(result, Squared)]
    assert {(result.number, result.square) for result in squares} == {(0, 0), (1, 1), (4, 16), (5, 25)}
    assert {result for result in done if isinstance(result, TaskFailed)} == FAILED
    assert len(done) == len(TASKS)
    # A user can correct the one; the other needs its stack trace.
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == ["square 3"]
    assert "KeyError: 3" in caplog.text
    workers = MakeSquarer(tmp_path).lines("processes.txt")
    assert len(workers) == len(set(workers)) == execution.workers
    assert (str(os.getpid()) in workers) == (execution.workers == 1)


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_a_worker_that_cannot_be_made_ends_the_run(execution, tmp_path):
    with pytest.raises(ModelError, match=r"^There is no model\.$"):
        results(TASKS, MakeSquarer(tmp_path, "raise"), execution)
    with pytest.raises(KeyError, match="weights"):
        results(TASKS, MakeSquarer(tmp_path, "bug"), execution)
    assert not MakeSquarer(tmp_path).lines("begun.txt")


def test_without_tasks_no_worker_is_made(tmp_path):
    assert results([], MakeSquarer(tmp_path, "raise"), Execution()) == []


def test_results_come_as_tasks_are_done(tmp_path):
    tasks = [Square(0, seconds=60), Square(1), Square(2)]
    skip_if_quick()
    iterator = run_tasks(tasks, MakeSquarer(tmp_path), Execution(workers=2), lambda task: task.name)
    assert {next(iterator).number, next(iterator).number} == {1, 2}
    begun = time.monotonic()
    iterator.close()  # stops the one that is not done
    assert time.monotonic() - begun < 30
    assert not running(tmp_path)


def test_a_killed_process_ends_the_run_with_one_sentence(tmp_path):
    with pytest.raises(WorkerDiedError, match=r"^A worker process was killed, .* Run the command again"):
        results([Square(0), Square(1, "kill"), *(Square(n, seconds=60) for n in range(2, 9))], MakeSquarer(tmp_path),
                Execution(workers=2))  # fmt: skip
    assert not running(tmp_path)


COMMAND = """
import sys
from pathlib import Path
from bifocal.data.parallel import Execution, run_tasks
from tests.data.tasks import MakeSquarer, Square
tasks = [Square(number, seconds=60) for number in range(4)]
list(run_tasks(tasks, MakeSquarer(Path(sys.argv[1])), Execution(workers=2), str))
"""


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_command_stops_its_processes(sent, tmp_path):
    process = Process("-c", COMMAND, tmp_path)
    wait_for(lambda: len(MakeSquarer(tmp_path).lines("begun.txt")) == 2)
    assert len(running(tmp_path)) == 2
    os.kill(process.process.pid, sent)
    assert process.finish(30).returncode != 0
    wait_for(lambda: not running(tmp_path))
    assert len(MakeSquarer(tmp_path).lines("removed.txt")) == 2  # each task could clean up


def running(folder: Path) -> list[str]:
    """The processes of workers that are running."""
    return [pid for pid in MakeSquarer(folder).lines("processes.txt") if Path("/proc", pid).exists()]


def wait_for(condition, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_processes_share_cores_and_gpus(monkeypatch):
    for name in ("OMP_NUM_THREADS", "RAYON_NUM_THREADS", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.setenv(name, "")  # what is set below is undone at the end
        monkeypatch.delenv(name)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(13)), raising=False)
    monkeypatch.setattr(worker_processes, "sys", type("Sys", (), {"modules": {}}))
    worker_processes._share_threads(4)
    assert (os.environ["OMP_NUM_THREADS"], os.environ["RAYON_NUM_THREADS"]) == ("3", "3")
    worker_processes._share_threads(2)
    assert os.environ["OMP_NUM_THREADS"] == "3"  # is set

    def gpu_of(number: int) -> str | None:
        worker_processes._share_gpus(number)
        return os.environ.pop("CUDA_VISIBLE_DEVICES", None)

    monkeypatch.setattr(worker_processes.glob, "glob", lambda _: [])
    assert gpu_of(1) is None
    monkeypatch.setattr(worker_processes.glob, "glob", lambda _: ["/dev/nvidia0", "/dev/nvidia1", "/dev/nvidia2"])
    assert [gpu_of(number) for number in range(4)] == ["0", "1", "2", "0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b")
    assert gpu_of(3) == "GPU-b"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # the user wants none
    assert gpu_of(1) == ""


def test_torch_is_told_its_share(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "")
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setenv("RAYON_NUM_THREADS", "1")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    threads = []
    monkeypatch.setattr("torch.set_num_threads", threads.append)
    worker_processes._share_threads(2)
    assert threads == [4]
    assert os.environ["RAYON_NUM_THREADS"] == "1"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(workers=0), "at least 1"),
        (dict(concurrency=0), "at least 1"),
        (dict(num_cpus=0.0), "part of a CPU or GPU"),
        (dict(num_gpus=-1.0), "part of a CPU or GPU"),
        (dict(workers=2, ray="local"), "exclude each other"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(BifocalError, match=message):
        Execution(**settings)


def test_ray_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setattr(parallel, "find_spec", lambda name: None)
    with pytest.raises(BifocalError, match=r"pip install 'bifocal\[ray\]'"):
        Execution(ray="local")
    assert Execution(workers=2).workers == 2


def test_an_address_where_nothing_listens(monkeypatch):
    with pytest.raises(BifocalError, match=r"^The Ray cluster '127\.0\.0\.1:1' cannot be used .* `ray start --head`"):
        ray_actors._require_reachable("127.0.0.1:1")
    ray_actors._require_reachable("auto")
    ray_actors._require_reachable("local")


@pytest.mark.parametrize(
    ("nodes", "settings", "expected"),
    [
        ([(2, 0), (3, 0)], dict(), 5),
        ([(2, 0), (3, 0)], dict(num_cpus=1.5), 3),
        ([(2, 0)], dict(num_cpus=0.1), 20),
        ([(2, 0), (8, 4)], dict(num_gpus=1.0), 4),
        ([(2, 0), (8, 4)], dict(num_gpus=0.5), 8),
        ([(0, 4)], dict(num_cpus=0.0, num_gpus=0.25), 16),
        ([(2, 0)], dict(concurrency=3), 3),
        ([(2, 0)], dict(num_gpus=1.0, concurrency=3, ray="auto"), 3),  # the cluster may add nodes
    ],
)
def test_as_many_actors_as_fit_the_nodes(nodes, settings, expected, monkeypatch):
    ray = pytest.importorskip("ray")
    dead = {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}}
    alive = [{"Alive": True, "Resources": {"CPU": float(cpus), "GPU": float(gpus)}} for cpus, gpus in nodes]
    monkeypatch.setattr(ray, "nodes", lambda: [dead, *alive])
    assert ray_actors._actors(Execution(**{"ray": "local", **settings})) == expected


def test_actors_that_would_wait_forever(monkeypatch):
    ray = pytest.importorskip("ray")
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 2.0}}])
    for settings in (dict(ray="auto"), dict(ray="local"), dict(ray="local", concurrency=2)):
        with pytest.raises(BifocalError, match="has the 1 CPUs and 1 GPUs that a worker needs"):
            ray_actors._actors(Execution(num_gpus=1.0, **settings))
