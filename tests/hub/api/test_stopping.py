"""`bifocal serve --model FOLDER --api` as a process that is stopped."""

import asyncio
import os
import re
import signal
import socket

import httpx
import pytest

from tests.conftest import LONG
from tests.hub.search.serving import Server, free_port
from tests.processes import Process

KEY = {"Authorization": "Bearer of-the-environment"}


@pytest.fixture
def begun(model_folder, tmp_path):
    """A server of the model alone, with a key."""
    port = free_port()
    command = ("-m", "bifocal", "serve", "--model", model_folder, "--api", "--port", str(port), "--model-name", "named")
    process = Process(*command, cwd=tmp_path, BIFOCAL_API_KEY="of-the-environment")
    with Server(process, port, tmp_path, "/health") as server:
        yield server


def test_sigterm_under_load(begun):
    """What has begun is answered, nothing else is, and the process ends as one that has done its work."""
    requests, texts = 6, [f"{LONG} {number}" for number in range(150)]

    async def load() -> tuple[list[httpx.Response], list[int]]:
        async with httpx.AsyncClient(base_url=begun.address, headers=KEY, timeout=60) as client:
            assert (await client.get("/")).status_code == 404, "there is no page"
            sent = [
                asyncio.create_task(client.post("/v1/embeddings", json={"input": texts, "model": "named"}))
                for _ in range(requests)
            ]
            while True:  # until all are in the queue, and none is done
                metrics = (await client.get("/metrics")).text
                (waiting,) = re.findall(r"^bifocal_queue_inputs (\S+)", metrics, re.MULTILINE)
                if float(waiting) == requests * len(texts):
                    break
                assert not any(task.done() for task in sent)
            begun.process.terminate()
            while accepts(begun.address):
                await asyncio.sleep(0.01)
            not_done = sum(not task.done() for task in sent)
            return await asyncio.gather(*sent), not_done

    answers, not_done = asyncio.run(load())
    assert not_done >= 1, "the server no longer accepts connections while it still works"
    assert [(answer.status_code, len(answer.json()["data"])) for answer in answers] == [(200, len(texts))] * requests
    assert exit_code(begun) == 0, begun.process.stderr
    assert "Traceback" not in begun.process.stderr
    assert f"Serving 'named': the API at {begun.address}/v1" in (begun.process.folder / "stdout").read_text()


def exit_code(server: Server) -> int | None:
    """Wait for the end of a server."""
    server.process.process.join(30)
    return server.process.process.exitcode


def accepts(address: str) -> bool:
    try:
        socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2])), timeout=5).close()
        return True
    except ConnectionRefusedError:
        return False


def test_ctrl_c(begun):
    assert httpx.get(f"{begun.address}/v1/models").status_code == 401
    os.kill(begun.process.process.pid, signal.SIGINT)
    assert exit_code(begun) == 0
    assert "Traceback" not in begun.process.stderr
