"""Listens, and stops without dropping what it has begun."""

import logging
import signal
import socket
from collections.abc import Callable
from typing import Any

import uvicorn

from bifocal.hub.api.settings import ApiSettingsError

logger = logging.getLogger(__name__)

_KEEP_ALIVE = 75  # seconds of an idle connection; clients drop theirs after fewer, and would send into a closed one
_BACKLOG = 2048  # connections that the system accepts before the server does


def bind(host: str, port: int) -> socket.socket:
    """Return a socket that has an address, but does not listen yet: clients are refused until the model is loaded.

    Args:
        host: address or name to listen on.
        port: port to listen on; 0 for any free one.

    Raises:
        ApiSettingsError: if the address cannot be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        raise ApiSettingsError(f"Cannot listen on {host}:{port} ({error.strerror}). Choose another port.") from error
    return bound


class _Server(uvicorn.Server):
    """A server that says when it stops, and ends as usual on SIGTERM and Ctrl+C: uvicorn would raise the signal again.

    Args:
        config: of uvicorn.
        stopping: called when the server no longer accepts connections.
    """

    def __init__(self, config: uvicorn.Config, stopping: Callable[[], None]) -> None:
        super().__init__(config)
        self.stopping = stopping

    async def shutdown(self, sockets: Any = None) -> None:
        self.stopping()
        await super().shutdown(sockets)


def run(app: Any, bound: socket.socket, stop_seconds: float, stopping: Callable[[], None]) -> None:
    """Serve an application until SIGTERM or Ctrl+C.

    The server then accepts no more connections and finishes the requests that have begun; those that take longer than
    `stop_seconds` are dropped. A second Ctrl+C drops them at once.

    Args:
        app: the application (ASGI).
        bound: as from `bind`.
        stop_seconds: time to finish.
        stopping: called when the server no longer accepts connections.
    """
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, server_header=False, lifespan="on", backlog=_BACKLOG,
        timeout_graceful_shutdown=round(stop_seconds), timeout_keep_alive=_KEEP_ALIVE,
    )  # fmt: skip
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        _Server(config, stopping).run(sockets=[bound])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
