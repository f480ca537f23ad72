"""A Ray cluster of two nodes, which are processes of this machine.

Run as a script, it starts the cluster, prints its address, and ends it when its input is closed.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil

NODES = 2
# Ray asks nothing of other machines; sockets need a short path.
ENVIRONMENT = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}


class RayCluster:
    """A cluster that is running.

    Args:
        address: its address, for `--ray`.
        process: the process that started it.
        folder: folder of its logs and sockets.
    """

    def __init__(self, address: str, process: subprocess.Popen, folder: str) -> None:
        self.address, self.process, self.folder = address, process, folder

    def actors(self) -> list[psutil.Process]:
        """The processes of actors that do tasks."""
        names = [(process, name_of(process)) for process in children(self.process.pid)]
        return [process for process, name in names if name.startswith("ray::MapWorker")]

    @property
    def environment(self) -> dict[str, str]:
        """Variables for a process that uses the cluster or starts one of its own."""
        return {**ENVIRONMENT, "RAY_TMPDIR": self.folder}


def children(pid: int) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).children(recursive=True)
    return []


def name_of(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.NoSuchProcess):
        return " ".join(process.cmdline())
    return ""


@contextlib.contextmanager
def running_cluster() -> Iterator[RayCluster]:
    """Start a cluster; it and all its processes are ended, whatever happens."""
    with ray_folder() as folder:
        yield from _cluster_in(folder)


@contextlib.contextmanager
def ray_folder() -> Iterator[str]:
    """A folder for Ray's logs and sockets, whose path is short enough; what still runs in it at the end is killed."""
    folder = tempfile.mkdtemp(prefix="ray-")
    try:
        yield folder
    finally:
        for process in psutil.process_iter():
            if folder in name_of(process):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        shutil.rmtree(folder, ignore_errors=True)


def _cluster_in(folder: str) -> Iterator[RayCluster]:
    environment = {**os.environ, **ENVIRONMENT, "RAY_TMPDIR": folder}
    script = [sys.executable, str(Path(__file__).resolve())]
    process = subprocess.Popen(script, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stdout is not None
        line = next((line for line in iter(process.stdout.readline, "") if line.startswith("{")), None)
        assert line is not None, "the cluster did not start"
        yield RayCluster(json.loads(line)["address"], process, folder)
    finally:
        below = children(process.pid)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate("", timeout=20)
        process.kill()
        process.wait()
        for left in below:
            with contextlib.suppress(psutil.NoSuchProcess):
                left.kill()
        psutil.wait_procs(below, timeout=10)


def main() -> None:
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "object_store_memory": 100 * 2**20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    for _ in range(NODES - 1):
        cluster.add_node(**{name: value for name, value in node.items() if name != "include_dashboard"})
    cluster.wait_for_nodes()
    print(json.dumps({"address": cluster.address}), flush=True)
    sys.stdin.read()
    cluster.shutdown()


if __name__ == "__main__":
    main()
